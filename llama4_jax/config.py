"""Typed configuration: what a model is, how it runs, and what an experiment does with it.

Every dataclass checks itself when it is made. Command-line overrides assign to fields one by one, so an app
calls `validated` once they are all in.

The letters in comments are the project's one legend, used in every signature and shape comment:

    B batch          T query positions   S key positions   D model width     F FFN width
    N query heads    K KV heads          H head size       E experts         X experts a token (top-k)
    G groups         M rows (tokens)     V vocabulary      C attention chunk
    P image patches  I image tiles       L layers

A prime marks a dimension's local shard inside shard_map.
"""

import dataclasses
from typing import Literal, NamedTuple, TypeVar, get_args, get_origin

from llama4_jax.errors import UserError

T = TypeVar("T")


def validated(config: T) -> T:
    """A deep copy of a config whose every dataclass has checked itself again. Raises UserError."""

    def copy(value):
        if dataclasses.is_dataclass(value):
            return validated(value)
        return {k: copy(v) for k, v in value.items()} if isinstance(value, dict) else value

    return dataclasses.replace(config, **{f.name: copy(getattr(config, f.name)) for f in dataclasses.fields(config)})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{type(config).__name__}.{name} must be positive, got {value}")


def _require_choices(config) -> None:
    """Each Literal field holds one of its values."""
    for field in dataclasses.fields(config):
        if get_origin(field.type) is Literal:
            value, choices = getattr(config, field.name), get_args(field.type)
            _require(
                value in choices,
                f"{type(config).__name__}.{field.name} must be {' or '.join(map(str, choices))}, got {value!r}",
            )


# ------------------------------------------------------------------------------------------------------------------------
# The model


@dataclasses.dataclass(unsafe_hash=True)
class RopeScaling:
    """Llama 3's stretching of rotary wavelengths; Scout uses 16 / 1 / 1 over 8,192 positions."""

    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        _require_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        _require(
            self.low_freq_factor <= self.high_freq_factor,
            f"RopeScaling.low_freq_factor={self.low_freq_factor} must not exceed high_freq_factor={self.high_freq_factor}",
        )


@dataclasses.dataclass(unsafe_hash=True)
class AttentionTemperature:
    """Queries of NoPE layers grow with position p by 1 + scale * log(1 + floor((p + 1) / floor)). arXiv 2501.19399."""

    floor: float = 8192
    scale: float = 0.1

    def __post_init__(self):
        _require_positive(self, "floor")


class LayerKind(NamedTuple):
    """What tells one decoder layer from another; everything else they share."""

    uses_rope: bool  # rotary, chunked ("local") attention; otherwise NoPE with full causal attention
    is_moe: bool


@dataclasses.dataclass(unsafe_hash=True)
class VisionConfig:
    """The vision tower, adapter and projector. Defaults are the published Llama 4's."""

    hidden_size: int = 1408
    num_layers: int = 34
    num_heads: int = 16
    mlp_size: int = 5632
    image_size: int = 336  # pixels of a square tile's side
    patch_size: int = 14
    num_channels: int = 3
    pixel_shuffle_ratio: float = 0.5
    adapter_size: int = 4096  # both hidden and output width of the adapter
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    patch_token_id: int = 200_092  # the token whose embedding a patch of an image replaces, `<|patch|>`
    image_start_token_id: int = 200_080
    image_end_token_id: int = 200_081

    def __post_init__(self):
        _require_positive(self, *(f.name for f in dataclasses.fields(self)))
        _require(self.hidden_size % self.num_heads == 0, f"VisionConfig.{self.num_heads=} must divide {self.hidden_size=}")
        head_dim = self.hidden_size // self.num_heads
        _require(head_dim % 4 == 0, f"VisionConfig: head size {head_dim} must be a multiple of 4: RoPE turns pairs by two axes")
        _require(self.image_size % self.patch_size == 0, f"VisionConfig.{self.patch_size=} must divide {self.image_size=}")


@dataclasses.dataclass(unsafe_hash=True)
class Transfer:
    """The size at which learning rate and initializer_range were tuned; see model/transfer.py for what follows."""

    base_width: int = 256  # hidden_size there
    base_depth: int = 4  # num_layers there

    def __post_init__(self):
        _require_positive(self, "base_width", "base_depth")


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
    """The architecture of one Llama 4 (or dense Llama). Llama 4's own values are the defaults."""

    vocab_size: int = 202_048  # V
    hidden_size: int = 5120  # D
    num_layers: int = 48  # L
    num_heads: int = 40  # N
    num_kv_heads: int = 8  # K
    head_dim: int = 128  # H; need not be hidden_size / num_heads

    num_experts: int = 16  # E
    experts_per_token: int = 1  # X
    expert_ffn_size: int = 8192  # F of a routed and of the shared expert
    dense_ffn_size: int = 16_384  # F of a layer without experts
    shared_expert: bool = True
    router_bias: bool = False  # a bias of each expert, outside the parameters, in the choice of experts alone; not in Llama 4
    moe_interval: int = 1  # every n-th layer has experts, the n-th first; 0: none has (a dense Llama)
    moe_layers: tuple[int, ...] | None = None  # these layers instead, when given

    nope_interval: int = 4  # every n-th layer is NoPE; 0: none is
    nope_layers: tuple[int, ...] | None = None  # these layers instead, when given
    attention_chunk_size: int | None = 8192  # C, of the layers with RoPE; None: full causal attention there too
    qk_norm: bool = True  # unscaled RMS norm of queries and keys after RoPE, in the layers with RoPE
    temperature: AttentionTemperature | None = dataclasses.field(default_factory=AttentionTemperature)
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None

    norm_eps: float = 1e-5
    attention_bias: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    transfer: Transfer | None = None  # scale initial deviations and learning rates from another size

    max_position_embeddings: int = 262_144
    bos_token_id: int | None = 200_000
    eos_token_ids: tuple[int, ...] = (200_001,)
    pad_token_id: int | None = 200_018

    vision: VisionConfig | None = None

    def __post_init__(self):
        _require_positive(
            self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "norm_eps",
            "rope_theta", "initializer_range", "max_position_embeddings",
        )  # fmt: skip
        _require(self.num_heads % self.num_kv_heads == 0, f"ModelConfig.{self.num_kv_heads=} must divide {self.num_heads=}")
        _require(self.head_dim % 2 == 0, f"ModelConfig.head_dim={self.head_dim} must be even: RoPE turns pairs")
        _require(self.moe_interval >= 0, f"ModelConfig.moe_interval must be 0 or more, got {self.moe_interval}")
        _require(self.nope_interval >= 0, f"ModelConfig.nope_interval must be 0 or more, got {self.nope_interval}")
        for name in ("moe_layers", "nope_layers"):
            for layer in getattr(self, name) or ():
                _require(0 <= layer < self.num_layers, f"ModelConfig.{name} names layer {layer}, but {self.num_layers=}")
        if any(kind.is_moe for kind in self.layer_kinds):
            _require_positive(self, "num_experts", "expert_ffn_size")
            _require(
                1 <= self.experts_per_token <= self.num_experts,
                f"ModelConfig.experts_per_token must be 1 to num_experts={self.num_experts}, got {self.experts_per_token}",
            )
        else:
            _require(not self.router_bias, "ModelConfig.router_bias needs a layer with experts, and this model has none")
        if not all(kind.is_moe for kind in self.layer_kinds):
            _require_positive(self, "dense_ffn_size")
        if self.attention_chunk_size is not None:
            _require_positive(self, "attention_chunk_size")
        _require(
            self.transfer is None or not self.tie_embeddings,
            "ModelConfig.transfer has one rule for a token table and another for a head; with tie_embeddings=True they are one",
        )

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each of the L layers."""

        def chosen(explicit, interval):
            if explicit is not None:
                return set(explicit)
            return set(range(interval - 1, self.num_layers, interval)) if interval else set()

        moe, nope = chosen(self.moe_layers, self.moe_interval), chosen(self.nope_layers, self.nope_interval)
        return tuple(LayerKind(uses_rope=i not in nope, is_moe=i in moe) for i in range(self.num_layers))

    @property
    def block_kinds(self) -> tuple[LayerKind, ...]:
        """The shortest block of layers that, repeated, gives all of them: the body of the scan."""
        kinds = self.layer_kinds
        periods = (p for p in range(1, self.num_layers + 1) if self.num_layers % p == 0)
        return next(kinds[:p] for p in periods if kinds == kinds[:p] * (self.num_layers // p))


@dataclasses.dataclass(unsafe_hash=True)
class ExecutionConfig:
    """How a model runs: nothing here changes what it computes beyond rounding."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matmuls; router, norms, softmax, loss stay float32
    matmul: Literal["plain", "int8", "fp8"] = "plain"  # of attention's and dense FFNs' projections; see model/low_precision.py
    remat: Literal["none", "projections", "layer"] = "none"  # what the backward pass recomputes; see model/decoder.py
    microbatches: int = 1  # parts of the batch that are computed one after another, their gradients added
    attention: str = "auto"  # an implementation in pallas_kernels/attention
    routing: str = "auto"  # an implementation in pallas_kernels/routing, on one device
    expert_ffn: str = "auto"  # an implementation in pallas_kernels/expert_ffn
    expert_exchange: Literal["auto", "all_to_all", "all_gather", "gather_weights"] = "auto"  # see parallel/README.md
    context_exchange: Literal["auto", "ring", "all_gather"] = "auto"  # how queries meet keys of other shards of a row
    context_layout: Literal["contiguous", "zigzag"] = "contiguous"  # zigzag gives every shard as much of the triangle
    loss_block_size: int = 512  # positions of each row whose logits exist at one time during training

    def __post_init__(self):
        _require_choices(self)
        _require_positive(self, "loss_block_size", "microbatches")


# ------------------------------------------------------------------------------------------------------------------------
# An experiment


@dataclasses.dataclass
class MeshConfig:
    """Sizes of the device mesh's axes, outermost first; -1 takes what the others leave (one axis at most)."""

    dcn_data: int = 1
    data: int = -1
    fsdp: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(size == -1 or size > 0, f"MeshConfig.{name} must be positive or -1, got {size}")
        free = [name for name, size in sizes.items() if size == -1]
        _require(len(free) <= 1, f"MeshConfig: only one axis may be -1, got {', '.join(free)}")


@dataclasses.dataclass
class DataConfig:
    """Text, or conversations with pictures, in; batches out.

    A source is a file or a folder, here or behind a URL such as gs://, s3:// or hf://, or `python:stdlib`: the help topics and
    the standard library's source that the running Python carries. Files are .txt, .md, .py (one document each), .jsonl,
    .jsonl.gz, .jsonl.zst (one a line), .parquet (one a row) and .array_record (one a record). With format=chat, files of JSON
    lines hold a conversation each: see data/README.md.
    """

    sources: tuple[str, ...] = ()
    weights: tuple[
        float, ...
    ] = ()  # shares of the training rows by source; empty: all are packed together, as large as they are
    heldout_sources: tuple[str, ...] = ()  # empty: whole documents of `sources` are held out
    heldout_fraction: float = 0.05  # of the bytes, when heldout_sources is empty
    text_field: str = "text"  # of a record
    deduplicate: bool = True  # drop near-duplicate documents before the split
    tokenizer: str = "bpe"  # `bpe` trains one on the training documents; a tokenizer.json or .model; `llama4`: llama-models';
    # chat: or the folder of a checkpoint, with its chat template
    tokenizer_ranks: int | None = None  # keep these first ranks of a tokenizer.model, for small models
    prepared: str | None = None  # a folder that llama4_jax.prepare made: read it; `sources` are compared with it if given
    sequence_length: int = 512  # T
    batch_size: int = 16  # B, over all devices and processes
    shuffle_seed: int = 0
    # Records that may be left out because they cannot be read, each named in the log; more stop the run. Each process of each
    # sitting counts anew, and of pictures that are decoded with their batches only its own.
    max_bad_records: int = 0
    # A run whose checkpoint is of other data (sources, weights, seed, tokenizer, batch size, anything above) is refused, or goes
    # on with the checkpoint's parameters and reads the changed data from their beginning.
    when_changed: Literal["refuse", "start_over"] = "refuse"
    format: Literal["text", "chat"] = "text"
    # With format=chat:
    loss_on: Literal["assistant", "last", "all"] = "assistant"  # which tokens count: the assistant's turns, its last one, all
    image_slots: int = 0  # I, image tiles that a row has room for, global tiles included
    image_tiles: int = 16  # of a picture at most, beside its global tile

    def __post_init__(self):
        _require_choices(self)
        _require_positive(self, "sequence_length", "batch_size", "image_tiles")
        for name in ("image_slots", "max_bad_records"):
            _require(getattr(self, name) >= 0, f"DataConfig.{name} must be 0 or more, got {getattr(self, name)}")
        _require(
            self.format == "text" or self.prepared is None,
            f"DataConfig.prepared={self.prepared} holds text; conversations are read from `sources`",
        )
        _require(
            0 < self.heldout_fraction < 1, f"DataConfig.heldout_fraction must lie between 0 and 1, got {self.heldout_fraction}"
        )
        _require(
            not (self.weights and self.sources) or len(self.weights) == len(self.sources),
            f"DataConfig.weights has {len(self.weights)} values for {len(self.sources)} sources",
        )
        _require(
            all(0 < weight < float("inf") for weight in self.weights),
            f"DataConfig.weights must be positive, got {', '.join(map(str, self.weights))}; leave a source out instead",
        )


@dataclasses.dataclass
class ObjectiveConfig:
    """What is minimised, and what keeps the experts evenly used meanwhile. Meta published none of it.

    The two weights are of terms that are added to the cross entropy. The bias moves only in a model that has one, see
    ModelConfig.router_bias. Capacity and jitter are of training alone: evaluation and sampling drop nothing.
    """

    load_balance_weight: float = 0.01  # Switch Transformer, arXiv 2101.03961, equation 4
    router_z_weight: float = 0.001  # ST-MoE, arXiv 2202.08906, equation 5
    bias_update_rate: float = 0.001  # logits a step that an expert's bias moves; arXiv 2408.15664, algorithm 1
    bias_anneal_fraction: float = 0.0  # of the steps: the last ones, over which the bias shrinks to zero; 0: it stays
    capacity_factor: float | None = None  # choices that an expert takes, over an even share; more are dropped. None: all
    router_jitter: float = 0.0  # what the router reads is multiplied by uniform(1 - jitter, 1 + jitter); arXiv 2101.03961

    def __post_init__(self):
        for name in ("load_balance_weight", "router_z_weight", "bias_update_rate"):
            _require(getattr(self, name) >= 0, f"ObjectiveConfig.{name} must be 0 or more, got {getattr(self, name)}")
        _require(
            0 <= self.bias_anneal_fraction <= 1,
            f"ObjectiveConfig.bias_anneal_fraction must lie in [0, 1], got {self.bias_anneal_fraction}",
        )
        _require(0 <= self.router_jitter < 1, f"ObjectiveConfig.router_jitter must lie in [0, 1), got {self.router_jitter}")
        if self.capacity_factor is not None:
            _require_positive(self, "capacity_factor")


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW or Muon under a warm-up, a plateau and a decay, gradients clipped by their global norm."""

    rule: Literal["adamw", "muon"] = "adamw"  # muon: the layers' matrices; the rest stays with adamw, at the same rate
    learning_rate: float = 3e-4  # at the peak
    warmup_steps: int = 100
    decay_fraction: float = 1.0  # of the steps after the warm-up; less than 1 keeps the peak first (warmup-stable-decay)
    decay_shape: Literal["cosine", "linear", "one_minus_sqrt"] = "cosine"
    final_fraction: float = 0.1  # of the peak, at the last step
    muon_beta: float = 0.95  # momentum of muon
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; norms and biases do not decay
    clip_norm: float = 1.0
    trainable: str = ".*"  # regular expression over parameter paths such as layers/layer_0/attention/query/kernel

    def __post_init__(self):
        _require_positive(self, "learning_rate", "eps", "clip_norm")
        _require(self.warmup_steps >= 0, f"OptimizerConfig.warmup_steps must be 0 or more, got {self.warmup_steps}")
        _require_choices(self)
        _require(0 < self.decay_fraction <= 1, f"OptimizerConfig.decay_fraction must lie in (0, 1], got {self.decay_fraction}")
        _require(0 <= self.final_fraction <= 1, f"OptimizerConfig.final_fraction must lie in [0, 1], got {self.final_fraction}")
        for name in ("b1", "b2", "muon_beta"):
            _require(0 <= getattr(self, name) < 1, f"OptimizerConfig.{name} must lie in [0, 1), got {getattr(self, name)}")


@dataclasses.dataclass
class CheckpointConfig:
    """When a run is saved, and which checkpoints stay: the newest, and beside them those that the other fields name."""

    every: int = 200  # steps between checkpoints; the last step is always saved
    keep: int = 2  # newest checkpoints that stay
    keep_every: int | None = None  # checkpoints of steps that are multiples of this stay for ever
    keep_best: str | None = None  # the checkpoint with the best value of an evaluation stays, such as heldout.bits_per_byte
    best_is: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self):
        _require_choices(self)
        _require_positive(self, "every", "keep")
        if self.keep_every is not None:
            _require_positive(self, "keep_every")


@dataclasses.dataclass
class EvaluationConfig:
    """One evaluation: a function registered in llama4_jax.evaluation, run on held-out data by the training loop."""

    function: str = "bits_per_byte"
    every: int = 200  # steps; it also runs after the last
    max_batches: int | None = None  # None: all of the held-out data

    def __post_init__(self):
        _require_positive(self, "every")


@dataclasses.dataclass
class ProfileConfig:
    """A window of steps that jax.profiler traces into the work directory's profile/."""

    start: int | None = None  # the first of them; None: no trace
    steps: int = 3

    def __post_init__(self):
        _require_positive(self, "steps")
        if self.start is not None:
            _require_positive(self, "start")


@dataclasses.dataclass
class AnomalyConfig:
    """Steps whose update is left out, on all processes alike: a loss or gradient that is not finite, and a spike.

    See training/anomalies.py. The mean is that of the last sound steps.
    """

    grad_norm_factor: float | None = 10.0  # a gradient norm over so many times the mean is a spike; None: never
    loss_factor: float | None = 3.0  # a loss over so many times the mean is a spike; None: never
    window: int = 100  # steps of the mean; so many must have been sound before anything counts as a spike
    rollback_after: int = 3  # steps left out in a row, after which the run goes back to its last checkpoint, past their batches

    def __post_init__(self):
        _require_positive(self, "window", "rollback_after")
        for name in ("grad_norm_factor", "loss_factor"):
            value = getattr(self, name)
            _require(value is None or value > 1, f"AnomalyConfig.{name} must be more than 1, got {value}")


@dataclasses.dataclass
class WatchConfig:
    """How a run looks after itself. Limits are seconds after which a process that stands still tells where, and ends with
    status 1, so that its launcher starts the job again; inf: never."""

    step_seconds: float = 300.0  # of a step ...
    step_factor: float = 20.0  # ... or so many times the median step, where that is longer
    compile_seconds: float = 7200.0  # of the compilation, the first step with it
    checkpoint_seconds: float = 3600.0  # of a restore, and of what a save holds training up
    evaluation_seconds: float = 7200.0
    replicas_every: int = 100  # steps between comparisons of the copies that devices hold; also before every save

    def __post_init__(self):
        _require_positive(self, *(f.name for f in dataclasses.fields(self)))


@dataclasses.dataclass
class Experiment:
    """Everything that a training run is; `get_config()` of a file in experiments/ returns one."""

    model: ModelConfig
    data: DataConfig
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluations: dict[str, EvaluationConfig] = dataclasses.field(default_factory=dict)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    anomalies: AnomalyConfig = dataclasses.field(default_factory=AnomalyConfig)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
    init_from: str | None = None  # a folder or hub name, as load_pretrained takes it, of the parameters to start from
    steps: int = 1000
    seed: int = 0
    log_every: int = 10

    def __post_init__(self):
        _require_positive(self, "steps", "log_every")
        _require(
            self.model.transfer is None or self.optimizer.rule == "adamw",
            f"ModelConfig.transfer holds for OptimizerConfig.rule=adamw, got {self.optimizer.rule!r}",
        )
        _require(
            self.model.router_bias or not self.objective.bias_anneal_fraction,
            f"ObjectiveConfig.bias_anneal_fraction={self.objective.bias_anneal_fraction} needs ModelConfig.router_bias=true",
        )
        best = self.checkpoint.keep_best
        _require(
            best is None or best.partition(".")[0] in self.evaluations,
            f"CheckpointConfig.keep_best={best} must be EVALUATION.VALUE of one of {', '.join(self.evaluations) or 'no evaluations'}",
        )
        chunk, length = self.model.attention_chunk_size, self.data.sequence_length
        _require(
            chunk is None or length <= chunk or length % chunk == 0,
            f"DataConfig.sequence_length={length} must be a multiple of ModelConfig.attention_chunk_size={chunk}, or at most that",
        )
