"""Logs, metrics, traces, settings: each set up in one place, the same for every role.

HTTP services find what they share in :mod:`telemetry.http.app` and :mod:`telemetry.http.server`, imported by name so
that a command-line call does not load a web server.
"""

from .http.header_secrets import HeaderSecret
from .logs import LogFormat, LogLevel, bind, bound, bound_facts, configure_logging, get_logger
from .metrics import GAP_BUCKETS_S, WAIT_BUCKETS_S, MetricsRegistry, render_metrics
from .redaction import redact_url
from .request_settings import RequestSettings, TenantLimits
from .settings import CommaList, ManagerUrls, ProcessId, RoleSettings, SettingFact, TelemetrySettings, explain_settings
from .tracing import (
    Span,
    configure_tracing,
    inject,
    shutdown_tracing,
    span,
    span_for_request,
    span_from,
    tracing_enabled,
)

__all__ = [
    "GAP_BUCKETS_S",
    "WAIT_BUCKETS_S",
    "CommaList",
    "HeaderSecret",
    "LogFormat",
    "LogLevel",
    "ManagerUrls",
    "MetricsRegistry",
    "ProcessId",
    "RequestSettings",
    "RoleSettings",
    "SettingFact",
    "Span",
    "TelemetrySettings",
    "TenantLimits",
    "bind",
    "bound",
    "bound_facts",
    "configure_logging",
    "configure_tracing",
    "explain_settings",
    "get_logger",
    "inject",
    "redact_url",
    "render_metrics",
    "shutdown_tracing",
    "span",
    "span_for_request",
    "span_from",
    "tracing_enabled",
]
