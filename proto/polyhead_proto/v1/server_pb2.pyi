from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BackboneInfo(_message.Message):
    __slots__ = ("source", "fingerprint", "architecture", "quantization", "dtype", "num_parameters", "num_bytes", "vocab_size")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    source: str
    fingerprint: str
    architecture: str
    quantization: str
    dtype: str
    num_parameters: int
    num_bytes: int
    vocab_size: int
    def __init__(self, source: _Optional[str] = ..., fingerprint: _Optional[str] = ..., architecture: _Optional[str] = ..., quantization: _Optional[str] = ..., dtype: _Optional[str] = ..., num_parameters: _Optional[int] = ..., num_bytes: _Optional[int] = ..., vocab_size: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_model_len", "max_batch_rows", "max_batch_tokens", "max_queued_requests", "max_adapter_rank", "max_n", "max_logprobs")
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTER_RANK_FIELD_NUMBER: _ClassVar[int]
    MAX_N_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_model_len: int
    max_batch_rows: int
    max_batch_tokens: int
    max_queued_requests: int
    max_adapter_rank: int
    max_n: int
    max_logprobs: int
    def __init__(self, max_model_len: _Optional[int] = ..., max_batch_rows: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_queued_requests: _Optional[int] = ..., max_adapter_rank: _Optional[int] = ..., max_n: _Optional[int] = ..., max_logprobs: _Optional[int] = ...) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("server_version", "backbone", "limits", "num_kv_blocks", "kv_block_size", "kv_cache_bytes", "adapter_pool_bytes", "adapter_pool_used_bytes", "num_adapters", "draining")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_POOL_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    backbone: BackboneInfo
    limits: Limits
    num_kv_blocks: int
    kv_block_size: int
    kv_cache_bytes: int
    adapter_pool_bytes: int
    adapter_pool_used_bytes: int
    num_adapters: int
    draining: bool
    def __init__(self, server_version: _Optional[str] = ..., backbone: _Optional[_Union[BackboneInfo, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., num_kv_blocks: _Optional[int] = ..., kv_block_size: _Optional[int] = ..., kv_cache_bytes: _Optional[int] = ..., adapter_pool_bytes: _Optional[int] = ..., adapter_pool_used_bytes: _Optional[int] = ..., num_adapters: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...
