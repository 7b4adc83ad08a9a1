"""OpenAI's service tiers on the queue: which tier a request gets, and the lane and band of it.

``flex`` waits behind all interactive requests, ``priority`` goes before those of the default tier, as far as the key's
tenant may. A tier that a tenant may not have becomes the default one, as with OpenAI's API: the answer says which.
"""

from __future__ import annotations

from typing import Final

from queue_schemas.lanes import DEFAULT_BAND, Lane, band_of_priority

FLEX: Final = "flex"
PRIORITY: Final = "priority"
DEFAULT: Final = "default"


def used_tier(asked: str, highest_band: int) -> str:
    """The tier of a request that named ``asked``; '' if it named none. ``highest_band``: the most urgent band that its
    tenant may have."""
    if asked == PRIORITY:
        return PRIORITY if highest_band < DEFAULT_BAND else DEFAULT
    return FLEX if asked == FLEX else DEFAULT if asked else ""


def place_of_request(tier: str, priority: int, highest_band: int, *, background: bool) -> tuple[Lane, int]:
    """Lane and band of a request with vLLM's ``priority``; ``background``: nobody waits for it."""
    lane = Lane.BACKGROUND if background or tier == FLEX else Lane.INTERACTIVE
    band = 0 if tier == PRIORITY else band_of_priority(priority)
    return lane, max(band, highest_band)
