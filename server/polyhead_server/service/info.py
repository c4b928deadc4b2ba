"""Server.Info: what this server is, what it allows and how full it is."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import grpc

from polyhead_proto.v1 import server_pb2, server_pb2_grpc
from polyhead_server.config import ServerConfig
from polyhead_server.service.ports import AdapterStore, Backbone, Engine


class InfoService(server_pb2_grpc.ServerServicer):
    def __init__(self, config: ServerConfig, engine: Engine, store: AdapterStore, backbone: Backbone) -> None:
        self._config = config
        self._engine = engine
        self._store = store
        self._backbone = backbone
        self._version = metadata.version("polyhead")

    async def Info(
        self, message: server_pb2.InfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> server_pb2.InfoResponse:
        status = self._engine.status()
        return server_pb2.InfoResponse(
            server_version=self._version,
            backbone=self._backbone_info(),
            limits=self._limits(),
            num_kv_blocks=status.kv_blocks_total,
            kv_block_size=self._config.kv_block_size,
            kv_cache_bytes=self._engine.kv_cache_bytes,
            adapter_pool_bytes=self._store.pool_bytes,
            adapter_pool_used_bytes=self._store.pool_used_bytes,
            num_adapters=len(self._store.list()),
            draining=status.draining,
        )

    def _backbone_info(self) -> server_pb2.BackboneInfo:
        backbone = self._backbone
        return server_pb2.BackboneInfo(
            source=str(backbone.source),
            fingerprint=backbone.fingerprint,
            architecture=backbone.architecture,
            quantization=backbone.quantization,
            dtype=backbone.dtype_name,
            num_parameters=backbone.num_parameters,
            num_bytes=backbone.num_bytes,
            vocab_size=backbone.vocab_size,
        )

    def _limits(self) -> server_pb2.Limits:
        config = self._config
        return server_pb2.Limits(
            max_model_len=self._engine.max_model_len,
            max_batch_rows=config.max_batch_rows,
            max_batch_tokens=config.max_batch_tokens,
            max_queued_requests=config.max_queued_requests,
            max_adapter_rank=config.max_adapter_rank,
            max_n=config.max_n,
            max_logprobs=config.max_logprobs,
        )
