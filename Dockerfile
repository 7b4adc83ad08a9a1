# syntax=docker/dockerfile:1
# One small image for every role: `docker run IMAGE router ...`, `manager ...`, `worker --engine-url ...`.
# vLLM is not inside: a worker attaches to vLLM's own image with --engine-url (compose.yaml, profile gpu).

FROM python:3.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
COPY requirements/build.lock requirements/runtime.lock requirements/
RUN python -m venv /opt/inferq \
    && /opt/inferq/bin/pip install -r requirements/build.lock -r requirements/runtime.lock
COPY . .
RUN /opt/inferq/bin/pip install --no-deps --no-build-isolation . \
    && /opt/inferq/bin/pip uninstall --yes setuptools pip

FROM python:3.12-slim-bookworm
LABEL org.opencontainers.image.title="inferq" \
      org.opencontainers.image.description="A durable queue in front of vLLM, behind the OpenAI API" \
      org.opencontainers.image.licenses="Apache-2.0"
# The folder of files and batches is there so that a volume mounted on it belongs to the user. Everything that is written
# belongs to group 0, too: some platforms run containers as a user of their own choice, without a name, in that group.
RUN useradd --system --uid 10001 --gid 0 --home-dir /var/lib/inferq --create-home inferq \
    && install --directory --owner inferq --group root /var/lib/inferq/store \
    && chmod -R g=u /var/lib/inferq
COPY --from=build /opt/inferq /opt/inferq
ENV PATH=/opt/inferq/bin:$PATH HOME=/var/lib/inferq PYTHONUNBUFFERED=1 INFERQ_LOG_FORMAT=json
USER 10001
WORKDIR /var/lib/inferq
ENTRYPOINT ["inferq"]
CMD ["--help"]
