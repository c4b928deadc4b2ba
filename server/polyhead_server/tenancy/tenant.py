"""Who is calling. Owns the way from a call's metadata to a tenant; knows neither gRPC nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tenant:
    name: str
    """Part of every cache key, so that tenants never share a KV block."""


DEFAULT_TENANT = Tenant(name="default")


def resolve_tenant(metadata: Mapping[str, str]) -> Tenant:
    """The tenant of a call with this `metadata` (lower-case keys, text values). Every caller is the default tenant."""
    return DEFAULT_TENANT
