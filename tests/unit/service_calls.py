"""The service on a real socket, with doubles behind it, and a stub to call it with.

Tests import the fixtures `as` themselves, which ruff takes for a use.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from service_doubles import Harness

from polyhead_proto.v1 import inference_pb2, inference_pb2_grpc


@pytest.fixture
def harness() -> Harness:
    return Harness()


@pytest.fixture
def channel(harness: Harness) -> Iterator[grpc.Channel]:
    with harness.serve() as service, grpc.insecure_channel(service.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> inference_pb2_grpc.InferenceStub:
    return inference_pb2_grpc.InferenceStub(channel)


def generate(**fields: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**({"prompt": "hello"} | fields))
