"""`polyhead-server`: reads the settings, builds backbone, store, engine and service, and runs them until a signal."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyhead_core.errors import ConfigError, PolyheadError
from polyhead_server.config import ServerConfig, describe_fields, load_config

if TYPE_CHECKING:
    from polyhead_core.backbone import Backbone
    from polyhead_server.metrics import Metrics
    from polyhead_server.service.server import Service

_FLAGS = {
    "backbone": "default, a Hugging Face directory, a .gguf file or a hub id",
    "adapters": "folder whose sub-folders are adapters, named after them",
    "listen": "HOST:PORT of the gRPC server; port 0 takes a free one",
    "metrics": "HOST:PORT of the Prometheus endpoint",
    "quantization": "int8 or none",
    "dtype": "float32, bfloat16 or auto",
    "drain-timeout-s": "after SIGTERM, how long running requests may take to finish",
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    level = options.pop("log_level").upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises on kernels that nothing here asks for
    try:
        config = load_config(options.pop("config"), options.pop("set"), **options)
        return _serve(config)
    except PolyheadError as error:
        print(f"polyhead-server: {error.message}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("polyhead"):
            raise
        print(
            f"polyhead-server: the package {error.name!r} is missing: pip install 'polyhead[server]'", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:  # while it was still starting; later ones are signals that drain
        return 130


def _parser() -> argparse.ArgumentParser:
    settings = "\n".join(f"  {name} ({kind}), default {default}" for name, kind, default in describe_fields())
    parser = argparse.ArgumentParser(
        prog="polyhead-server",
        description="Serve one backbone and many adapters over gRPC.",
        epilog=f"settings for --set and --config (TOML):\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, text in _FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="S" if flag.endswith("-s") else flag.upper(), help=text)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; the last counts")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser


def _serve(config: ServerConfig) -> int:
    # Imported here: they need torch, and --help and a wrong setting should not wait for it.
    import torch

    from polyhead_core.backbone import load_backbone
    from polyhead_server.engine.engine import Engine
    from polyhead_server.metrics import Metrics
    from polyhead_server.service.server import Service
    from polyhead_server.store.store import AdapterStore

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    metrics = Metrics(max_adapter_labels=config.metrics_max_adapter_labels)
    metrics_address = _serve_metrics(config, metrics)
    backbone = load_backbone(
        config.backbone,
        quantization=config.quantization,
        dtype=config.dtype,
        device=config.device,
        cache_dir=Path(config.cache_dir) if config.cache_dir else None,
    )
    store = AdapterStore.for_backbone(config, backbone, metrics)
    engine = Engine(config, backbone, store, metrics)

    async def run() -> None:
        service = Service(config, engine, store, backbone, metrics)
        await run_until_signal(service, config, _facts(backbone, metrics_address))

    asyncio.run(run())
    return 0


def _serve_metrics(config: ServerConfig, metrics: Metrics) -> str:
    """The address scraped, "" for none."""
    if not config.metrics:
        return ""
    host, _, port = config.metrics.rpartition(":")
    try:
        return f"{host}:{metrics.serve(host.strip('[]'), int(port))}"
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {config.metrics}: {error}") from error


def _facts(backbone: Backbone, metrics_address: str) -> str:
    text = (
        f"backbone {backbone.source} ({backbone.architecture}, {backbone.num_parameters:,} parameters,"
        f" {backbone.num_bytes:,} bytes, {backbone.quantization}, {backbone.dtype_name},"
        f" fingerprint {backbone.fingerprint[:12]})"
    )
    return text + (f"\nmetrics http://{metrics_address}/metrics" if metrics_address else "")


async def run_until_signal(service: Service, config: ServerConfig, facts: str) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal stops at once."""
    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    port = await service.start()
    print(facts)
    print(f"listening on {config.listen.rpartition(':')[0]}:{port}", flush=True)
    await first.wait()
    draining = asyncio.create_task(service.drain())
    stopping = asyncio.create_task(second.wait())
    await asyncio.wait((draining, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not draining.done():
        draining.cancel()
        await service.stop()
        return
    draining.result()


if __name__ == "__main__":
    sys.exit(main())
