"""The sections of a run's configuration; what a method needs is in `adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from polyhead_core.devices import DEVICE_NAME
from polyhead_trainer.config.adapter import AdapterSettings, LoraSettings
from polyhead_trainer.config.base import Count, Fraction, Positive, Section
from polyhead_trainer.data.forms import FIELDS


def _of_one_form(columns: dict[str, str]) -> dict[str, str]:
    if columns and not any(set(columns) == set(fields) for fields in FIELDS):
        forms = "; ".join(" and ".join(fields) for fields in FIELDS)
        raise ValueError(f"expected a column for every field of one form: {forms}")
    return columns


def _told_apart(labels: list[str]) -> list[str]:
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if len(labels) == 1 or twice:
        raise ValueError(f"expected two labels or more, each once{f'; {twice[0]!r} is there twice' if twice else ''}")
    return labels


def _of_known_kind(device: str) -> str:
    if DEVICE_NAME.fullmatch(device) is None:
        raise ValueError("expected cpu, cuda, or cuda:N for one GPU of several")
    return device


Columns = Annotated[dict[str, str], AfterValidator(_of_one_form)]
"""From fields of one form to the data's own names for them."""


class BackboneSection(Section):
    source: str = "default"
    """`default` (SmolLM2-135M-Instruct), a Hugging Face directory, a .gguf file or a hub id."""
    quantization: Literal["int8", "llm.int8", "nf4", "none"] = "int8"
    """`int8`: the very layers that the server runs; `llm.int8`: bitsandbytes' LLM.int8; `nf4`: QLoRA's four bits, its
    constants quantised as well, on CUDA; `none`: weights in `dtype`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the activations, and of the weights with quantization = none; auto: float32 on the CPU, else bfloat16.
    On a CPU that multiplies bfloat16 itself, int8 trains 1.5 times as fast with it (Zen 5)."""
    device: Annotated[str, AfterValidator(_of_known_kind)] = "cpu"
    """`cpu`, `cuda`, or `cuda:N` for one GPU of several."""
    cache_dir: Path | None = None
    """Where converted backbones are kept; unset: `$POLYHEAD_CACHE`, `$XDG_CACHE_HOME/polyhead`, `~/.cache/polyhead`."""


class DataSection(Section):
    train: Annotated[list[str], Field(min_length=1)]
    """What to learn from; each entry is a file (.jsonl, .json with an object on every line, .parquet, .csv, .tsv), a
    directory of such files or one made by `save_to_disk` (with several splits: DIRECTORY:SPLIT), or a data set of the
    Hugging Face hub (hub:NAME, hub:NAME:SPLIT, hub:NAME:CONFIGURATION:SPLIT; a SPLIT may be a slice, train[:80%]).
    Every record has the fields prompt and completion, or messages alone (a list of {"role": ..., "content": ...}, of
    which every answer of the assistant is learned); for classification text and label; for preferences prompt, chosen
    and rejected."""
    held_out: Annotated[list[str], Field(min_length=1)]
    """What to measure on, before and after; entries as in train. No example may be in both."""
    columns: Columns = {}
    """Where the data name their columns otherwise: which column holds which field, all fields of the form, such as
    {prompt = "question", completion = "answer"}; columns that are not named are ignored. Unset: a record has the fields
    alone. A record that has exactly the fields' names is taken as it is."""
    streaming: bool = False
    """Read, shuffle and encode training examples on the way, where memory cannot hold them; all records are read and
    checked once before the first step. Needs training.max_steps. Held-out data are always held."""
    shuffle_buffer: Positive = 10_000
    """With streaming: records that are held to be drawn from at random; the order of the files is random too. Data
    sorted by kind want a buffer larger than a kind's stretch."""
    max_length: Positive = 512
    """Examples of more tokens are left out, and counted; one of fewer that the backbone has no positions for is an
    error."""
    labels: Annotated[list[str], AfterValidator(_told_apart)] = []
    """For classification: every label, in the order of the scores; empty: those of `train`, the commonest first."""
    name: str = ""
    """The data's name, for the model card."""
    source: str = ""
    """Where the data comes from, for the model card."""
    license: str = ""
    """The data's licence, for the model card."""


class TrainingSection(Section):
    epochs: Positive | None = None
    """Passes over the data; exactly one of epochs and max_steps."""
    max_steps: Positive | None = None
    """Optimizer steps, over as many passes as they take."""
    batch_size: Positive = 16
    """Examples per optimizer step."""
    micro_batch_size: Positive | None = None
    """Most examples in one forward pass; unset: batch_size. Smaller saves memory and changes results by rounding alone
    (and which random numbers dropout draws)."""
    packing: bool = False
    """Lay the examples of a forward pass end to end, without padding and without one seeing another. Saves time and
    changes no result; refused where the backbone or the method could not keep the examples apart."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "cosine-with-min", "wsd", "inverse-sqrt"] = "cosine"
    """How the learning rate falls after the warm-up: cosine and linear to 0, constant not at all, cosine-with-min to
    min_learning_rate, wsd stays and falls over the last steps, inverse-sqrt as 1 / sqrt(step)."""
    min_learning_rate: Fraction = 0.1
    """With schedule = cosine-with-min: where it ends, as a share of the peak."""
    decay: Fraction = 0.1
    """With schedule = wsd: share of the steps after the warm-up over which the rate falls to 0 at the end."""
    warmup: Fraction = 0.1
    """Share of the steps over which the learning rate rises linearly."""
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "sgd", "adafactor"] = "adamw"
    """adamw-8bit: bitsandbytes' (states in 8 bits; on the CPU as well); paged-adamw-8bit: the same with states that
    move to host memory under pressure (CUDA alone); adafactor: one row and one column of states for a matrix, and steps
    of torch's kind: of the size of the parameter (at least 1e-3) times the smaller of learning_rate and 1 / sqrt(step),
    so that it wants rates near 1."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Of the AdamW family: decay rates of the first and second moments."""
    momentum: Fraction = 0.0
    """Of sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (with sgd: added to the gradient)."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    activation_checkpointing: Literal["none", "all", "selective"] = "none"
    """Layers keep their input alone and are computed again in backward (all), or keep their products and attention and
    compute the rest again (selective): memory for time, the same gradients."""
    activation_checkpointing_every: Positive = 1
    """Only every k-th layer is checkpointed."""
    compile: bool = False
    """torch.compile on each transformer layer: the first steps take a minute or two longer, the others can take less
    time, with weights in floating point. Results differ by rounding."""
    logit_chunk: Count = 2**25
    """Most logits (label tokens times vocabulary) held at once; beyond, losses and measures are computed in chunks of
    label tokens. 0: never in chunks."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Noise on the embeddings while training (NEFTune, Jain et al. 2023; 5 there), the smaller the longer a padded row,
    or a packed example, is; 0: none."""
    evaluate_every: Count = 0
    """Steps between measurements of the held-out loss while training; 0: before and after alone."""
    early_stopping_patience: Count = 0
    """Training ends after this many measurements in a row without a new best held-out loss; 0: never early."""
    keep: Literal["last", "best"] = "last"
    """Which weights a run ends with: the last step's, or those of the best measured held-out loss, of which a copy is
    held in host memory. That choice makes the held-out loss a little too good."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the adapter's initial weights, the dropout and the order of the data."""
    num_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Compute threads; 0: as torch chooses."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("exactly one of epochs and max_steps must be set")
        return self

    @model_validator(mode="after")
    def _compiled(self) -> TrainingSection:
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                "activation_checkpointing = selective chooses among operators, which compile joins: set all or none"
            )
        return self

    @model_validator(mode="after")
    def _measured(self) -> TrainingSection:
        if not self.evaluate_every and (self.early_stopping_patience or self.keep == "best"):
            raise ValueError("early_stopping_patience and keep = best need evaluate_every: how often to measure")
        return self


class EvaluateSection(Section):
    max_examples: Count = 200
    """Held-out examples whose loss is measured; 0: all."""
    batch_size: Positive = 32
    """Most held-out examples in one forward pass, and most that are answered at once (preferences: pairs, of two texts
    each). Smaller saves memory and changes results by rounding alone."""
    generate_examples: Count = 32
    """Held-out examples that are answered, greedily, by the backbone and by the tuned model."""
    max_new_tokens: Positive = 32
    """Length limit of those answers."""
    choices: list[str] = []
    """For classification: every possible completion. Measures how often the right one is the most likely of them,
    which is fair to a backbone that does not know the form of the answer. Their first tokens must differ."""
    general_text: Path | None = None
    """A text of another kind: its perplexity before and after shows what was forgotten."""
    earlier: list[str] = []
    """Held-out data of tasks that were learned before this one, entries as in data.train, max_examples of each: their
    loss before and after shows what was forgotten. With adapter.warm_start the loss before is that adapter's."""
    earlier_columns: Columns = {}
    """As data.columns, for the data of `earlier`."""
    general_tokens: Positive = 4096
    """How many of its tokens are used."""
    show: Count = 4
    """How many answers are printed side by side."""


class CheckpointSection(Section):
    every_steps: Count = 100
    """Optimizer steps between two checkpoints in `<output>.checkpoints`; 0: none. A run longer than this also keeps its
    last step until the output is published; then all of them go."""
    keep: Positive = 2
    """How many of the last checkpoints are kept while the run goes on."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in memory; otherwise the next step waits."""


class ParallelSection(Section):
    """How several processes share one run; a single one has no use for it."""

    strategy: Literal["fsdp", "ddp"] = "fsdp"
    """`fsdp`: parameters (frozen ones too), gradients and optimizer states in shards, one on each rank; `ddp`: all of
    them whole on every rank."""
    wrap: str | None = None
    """fsdp: class of the layers that are gathered one at a time; unset: the classes of the model's stacks
    of layers."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """fsdp: type in which parameters are gathered and computed with; unset: their own. int8 stays int8."""
    reduce_dtype: Literal["float32", "bfloat16"] | None = None
    """fsdp: type in which gradients are summed over the ranks; unset: that of the computation."""
    output_dtype: Literal["float32", "bfloat16"] | None = None
    """fsdp: type of what the model returns; unset: as computed."""
    cpu_offload: bool = False
    """fsdp on GPUs: shards, gradients and optimizer states stay in host memory, where the optimizer steps too."""
    timeout_s: Positive = 1800
    """How long a rank waits for the others before it gives up."""


class PreferenceSection(Section):
    beta: Annotated[float, Field(gt=0)] = 0.1
    """For task = preference, DPO's beta: the larger, the nearer the model stays to the backbone."""


class TrackingSection(Section):
    """Who else is told of the run; TensorBoard's event files are always written."""

    mlflow: bool = False
    """Log to MLflow, as its own environment variables say (MLFLOW_TRACKING_URI, ...). Needs the extra `mlflow`."""
    wandb: bool = False
    """Log to Weights & Biases, as its own environment variables say (WANDB_PROJECT, WANDB_MODE, ...). Needs the extra
    `wandb`."""


class ProfileSection(Section):
    """Where the time of some steps goes, by torch.profiler: a trace of each rank in `<output>.profile`, for Perfetto,
    chrome://tracing or TensorBoard's profile plugin, and a table of operators in the report."""

    steps: Count = 0
    """Optimizer steps (with [[adapters]]: rounds) that are profiled; 0: none. A trace takes megabytes a step."""
    after: Count = 2
    """Steps of this process before them: the first ones allocate, and compile."""
    memory: bool = False
    """Note who allocates what, too."""


class RunConfig(Section):
    output: Path
    """The adapter's directory. It appears only when the run is complete."""
    task: Literal["completion", "classification", "preference", "seq2seq"] = "completion"
    """`completion`: texts that continue a prompt or a conversation; `classification`: one label for a text;
    `preference`: the better of two completions, learned with DPO; `seq2seq`: completions by an encoder-decoder."""
    title: str = ""
    """What the adapter does, in one line, for the model card."""
    backbone: BackboneSection = BackboneSection()
    adapter: AdapterSettings = LoraSettings()
    data: DataSection
    training: TrainingSection
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    parallel: ParallelSection = ParallelSection()
    preference: PreferenceSection = PreferenceSection()
    tracking: TrackingSection = TrackingSection()
    profile: ProfileSection = ProfileSection()

    def with_labels(self, labels: list[str]) -> RunConfig:
        """The same run with its labels written down: who reloads its output needs no training data for them."""
        return self.model_copy(update={"data": self.data.model_copy(update={"labels": labels})})

    @model_validator(mode="after")
    def _task_fits(self) -> RunConfig:
        method = self.adapter.method
        if self.data.streaming and self.training.max_steps is None:
            raise ValueError(
                "data.streaming = true: nobody knows how many examples an epoch has before all are encoded: set "
                "training.max_steps in place of training.epochs"
            )
        if method == "head" and self.task != "classification":
            raise ValueError(f"adapter.method = head trains a classifier: set task = classification, not {self.task}")
        if self.task == "seq2seq":
            self._check_seq2seq()
        if self.task == "classification":
            self._check_classification()
        if self.task == "preference":
            self._check_preference()
        if self.training.packing and self.task != "completion":
            raise ValueError(f"training.packing works with task = completion, not {self.task}: leave it out")
        return self

    def _check_classification(self) -> None:
        others = "choose lora, ia3, ln_tuning, bottleneck, head or full"
        if self.adapter.method in ("prompt_tuning", "p_tuning", "prefix_tuning"):
            raise ValueError(
                f"adapter.method = {self.adapter.method} with task = classification: peft cannot switch virtual tokens "
                f"off in a classifier, and transformers then reads the scores where a text's padding is: {others}"
            )
        if self.adapter.method == "llama_adapter":
            raise ValueError(
                "adapter.method = llama_adapter with task = classification: peft neither trains nor saves the "
                f"classifier's scores with it, and all labels would stay equally likely: {others}"
            )
        if isinstance(self.adapter, LoraSettings) and self.adapter.init in ("pissa", "olora"):
            raise ValueError(
                f"adapter.init = {self.adapter.init} with task = classification: peft leaves the classifier's scores "
                "out of what it saves then: set adapter.init = default"
            )
        if self.evaluate.general_text is not None or self.evaluate.earlier:
            raise ValueError(
                "evaluate.general_text and evaluate.earlier measure a language model, and with task = classification "
                "there is none any more: leave them out"
            )

    def _check_preference(self) -> None:
        if self.adapter.method == "full":
            raise ValueError(
                "task = preference compares the model with itself without its adapter, and adapter.method = full has "
                "none: choose another method"
            )
        if isinstance(self.adapter, LoraSettings) and self.adapter.bias != "none":
            raise ValueError(
                f"adapter.bias = {self.adapter.bias} with task = preference: the trained biases stay on when the "
                "adapter is switched off, and the reference would drift with them: set adapter.bias = none"
            )

    def _check_seq2seq(self) -> None:
        if self.adapter.method not in ("lora", "ia3", "full"):
            raise ValueError(f"task = seq2seq works with adapter.method = lora, ia3 or full, not {self.adapter.method}")
        if self.training.neftune_alpha:
            raise ValueError("training.neftune_alpha knows no encoder-decoders, whose two halves embed: leave it out")
        if self.evaluate.general_text is not None or self.evaluate.earlier or self.evaluate.choices:
            raise ValueError("task = seq2seq has no evaluate.general_text, evaluate.earlier or evaluate.choices")
