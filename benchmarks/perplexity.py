"""Perplexity of the int8 backbone against the same weights in float32, on real text that was not used for calibration.

Text: editorial sentences of the New York Times from vaderSentiment's data set (MIT), the first --tokens tokens in
windows of --window. Rows: float32; int8 weights with float32 activations; plain W8A8; calibrated W8A8; and the last as
it is served, through the engine with its fused layers and bfloat16 KV cache.
    python benchmarks/perplexity.py [--backbone SOURCE] [--tokens 20480] [--out results/perplexity.json]
"""

from __future__ import annotations

import argparse
import io
import json
import math
import tarfile
import time
from pathlib import Path

import torch
from in_process import engine_with
from torch.nn import functional

from polyhead_core.backbone import Backbone, download_pypi, load_backbone
from polyhead_core.int8 import Int8Linear
from polyhead_core.paths import default_cache_dir

_SDIST = ("vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")


def news_text() -> str:
    name, version, sha256 = _SDIST
    path = download_pypi(name, version, sha256=sha256, cache_dir=default_cache_dir(), sdist=True)
    with tarfile.open(path) as outer:
        inner = outer.extractfile(f"{name}-{version}/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            member = archive.extractfile("hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt")
            assert member is not None
            lines = member.read().decode("utf-8", errors="replace").splitlines()
    return "\n".join(line.split("\t")[2] for line in lines if line.count("\t") >= 2)


@torch.no_grad()
def perplexity(backbone: Backbone, tokens_NW: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but each window's first."""
    total, count = 0.0, 0
    for window in tokens_NW:
        logits = backbone.model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count)


def served_perplexity(backbone: Backbone, tokens_NW: torch.Tensor) -> float:
    """The same from the engine's scores of the windows."""
    with engine_with(loaded=backbone, kv_cache_bytes=256 << 20) as engine:
        answers = [engine.submit(window.tolist(), score=True) for window in tokens_NW]
        for answer in answers:
            answer.result()
    logprobs = [logprob for answer in answers for logprob in answer.prompt_logprobs]
    assert len(logprobs) == tokens_NW.shape[0] * (tokens_NW.shape[1] - 1)
    return math.exp(-sum(logprobs) / len(logprobs))


def weight_only(backbone: Backbone) -> Backbone:
    """The same int8 weights, multiplied in float32: what is lost by the weights alone."""
    for module in backbone.model.modules():
        if isinstance(module, Int8Linear):
            weight, bias = module.dequantize(), module.bias
            module.forward = lambda x, weight=weight, bias=bias: functional.linear(x, weight, bias)  # type: ignore[method-assign]
    return backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("results/perplexity.json"))
    arguments = parser.parse_args()
    cases = {
        "float32": lambda: load_backbone(arguments.backbone, quantization="none", dtype="float32"),
        "int8 weights only": lambda: weight_only(load_backbone(arguments.backbone, calibrate=False)),
        "W8A8 plain": lambda: load_backbone(arguments.backbone, calibrate=False),
        "W8A8 calibrated": lambda: load_backbone(arguments.backbone),
        "as served": lambda: load_backbone(arguments.backbone),
    }
    rows = []
    for name, load in cases.items():
        backbone = load()
        ids = backbone.tokenizer(news_text(), return_tensors="pt", verbose=False).input_ids[0]
        count = min(arguments.tokens, len(ids)) // arguments.window
        tokens = ids[: count * arguments.window].reshape(count, arguments.window)
        started = time.perf_counter()
        value = (served_perplexity if name == "as served" else perplexity)(backbone, tokens)
        base = rows[0]["perplexity"] if rows else value
        row = {"case": name, "perplexity": value, "relative": value / base - 1, "bytes": backbone.num_bytes}
        rows.append(row)
        seconds = time.perf_counter() - started
        print(
            f"{name:20s} {value:9.4f} {100 * row['relative']:+7.3f} %  {backbone.num_bytes:>12,} bytes {seconds:.0f} s",
            flush=True,
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"tokens": int(tokens.numel()), "window": arguments.window, "torch": torch.__version__, "rows": rows}
    arguments.out.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
