"""The shape of a GPT, dense or with experts, and its parameter counts."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from hp_plugin.planner.inputs.hugging_face.fields import MAX_LAYERS
from hp_plugin.refusal import shown

ACTIVATIONS = ("", "silu", "gelu", "quick_gelu", "squared_relu")
"""What an MLP's activation may be; "" is SiLU in gated ones and GELU in others."""

MAX_SIZE = 10_000_000
"""Width, heads, experts or vocabulary beyond which one is; positions and bases of angles are larger numbers."""
_LARGER = {"rotary_base": 10_000, "learned_positions": 10_000, "window": 10_000}


@dataclass(frozen=True)
class ModelShape:
    """A GPT in the letters of the design: D hidden size, h query heads, g key/value heads, d head dimension.

    Args:
        ffn: width of the MLP (of one expert). gated: three MLP matrices (SwiGLU) instead of two.
        vocab: vocabulary size, 0 for the transformer body alone. tied: one matrix for embedding and output.
        biases: whether linear layers have biases. norm_biases: whether norms have (LayerNorm) or not (RMSNorm).
        learned_positions: length of a learned position table, 0 for none.
        experts: experts per MoE layer, 0 for a dense model; top_k of them see a token; every `moe_every`-th layer
            (counted from the first) is a MoE layer.
        dropout: whether attention and hidden dropout are on.
        qkv_bias, proj_bias, mlp_bias: whether the QKV projection, the output projection or the MLP's linears have a
            bias where other layers have none. qk_norm: whether every query and key head is normalized.
        norms: norms of the hidden size per layer. norm_one_plus: whether they multiply by one plus their weight.
        activation: the MLP's, where it is not SiLU (gated) or GELU (not gated).
        window: positions that a query sees (itself included), 0 for all before it; in every `window_every`-th layer it
            sees all (0: in none).
        rotary_percent: share of a head's dimension that is rotated. rotary_scaling: Llama 3's factor, 0 for none.
            rotary_interpolation: factor by which positions are divided, 0 for none.
        unbuilt: parts that are counted, and that no flag of Megatron-LM's pretrain_gpt.py builds.

    Raises:
        ValueError: sizes that contradict each other.
    """

    name: str
    layers: int
    D: int
    h: int
    g: int
    d: int
    ffn: int
    vocab: int = 0
    gated: bool = False
    tied: bool = False
    biases: bool = False
    norm_biases: bool = True
    learned_positions: int = 0
    rotary: bool = True
    dropout: bool = False
    experts: int = 0
    top_k: int = 1
    moe_every: int = 1
    qkv_bias: bool = False
    qk_norm: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    norms: int = 2
    norm_one_plus: bool = False
    norm_epsilon: float = 1e-5
    activation: str = ""
    window: int = 0
    window_every: int = 0
    rotary_base: int = 10_000
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    rotary_scaling: float = 0.0
    rotary_interpolation: int = 0
    unbuilt: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "D", "h", "g", "d", "ffn", "top_k", "moe_every", "norms", "rotary_base"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"model {self.name}: {name} must be a positive integer, got {shown(value)}")
            self._check_size(name, value)
        for name in ("vocab", "learned_positions", "experts", "window", "window_every", "rotary_interpolation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"model {self.name}: {name} must be an integer of at least 0, got {shown(value)}")
            self._check_size(name, value)
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"model {self.name}: activation {shown(self.activation)} is none of {', '.join(ACTIVATIONS[1:])}"
            )
        if not (0 < self.rotary_percent <= 1 and 0 < self.norm_epsilon < inf and 0 <= self.rotary_scaling < inf):
            raise ValueError(
                f"model {self.name}: rotary_percent={self.rotary_percent:g} is a share, norm_epsilon="
                f"{self.norm_epsilon:g} and rotary_scaling={self.rotary_scaling:g} are not negative"
            )
        if self.layers > MAX_LAYERS:
            said = f"{shown(self.layers)} layers; models of up to {MAX_LAYERS} are planned"
            raise ValueError(f"model {self.name}: {said}")
        if self.h % self.g:
            raise ValueError(f"model {self.name}: h={self.h} query heads are no multiple of g={self.g} key/value heads")
        if self.experts and self.top_k > self.experts:
            raise ValueError(f"model {self.name}: top_k={self.top_k} of only {self.experts} experts")

    def _check_size(self, name: str, value: int) -> None:
        most = MAX_SIZE * _LARGER.get(name, 1)
        if value > most and name != "layers":
            raise ValueError(f"model {self.name}: {name}={shown(value)} is more than the {most:,} that are planned")

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.moe_layers_before(self.layers)

    def moe_layers_before(self, layer: int) -> int:
        """Layers with experts among the first `layer`."""
        return -(-layer // self.moe_every) if self.experts else 0

    def is_moe(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) has experts."""
        return bool(self.experts) and layer % self.moe_every == 0

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's QKV and output projections."""
        rows = (self.h + 2 * self.g) * self.d
        biases = rows * (self.biases or self.qkv_bias) + self.D * (self.biases or self.proj_bias)
        return self.D * rows + self.h * self.d * self.D + biases

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one dense MLP, or of one expert."""
        inner = (2 if self.gated else 1) * self.ffn
        return self.D * inner + self.ffn * self.D + (inner + self.D if self.biases or self.mlp_bias else 0)

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm."""
        return self.D * (2 if self.norm_biases else 1)

    @property
    def qk_norm_parameters(self) -> int:
        """Parameters of one layer's norms of queries and keys, which all heads share."""
        return 2 * self.d * (2 if self.norm_biases else 1) if self.qk_norm else 0

    def layer_parameters(self, moe: bool) -> int:
        """Parameters of one layer, all experts and the router counted."""
        mlp = self.experts * self.mlp_parameters + self.D * self.experts if moe else self.mlp_parameters
        return self.attention_parameters + mlp + self.norms * self.norm_parameters + self.qk_norm_parameters

    @property
    def embedding_parameters(self) -> int:
        """Parameters before the first layer."""
        return (self.vocab + self.learned_positions) * self.D

    @property
    def parameters(self) -> int:
        """All parameters."""
        body = sum(self.layer_parameters(self.is_moe(layer)) for layer in range(self.layers))
        head = 0 if self.tied else self.vocab * self.D
        return body + self.embedding_parameters + self.norm_parameters + head

    @property
    def active_parameters(self) -> int:
        """Parameters that work on one token: of the experts, the top-k."""
        idle = self.moe_layers * (self.experts - self.top_k) * self.mlp_parameters
        return self.parameters - idle

    def attended(self, positions: int) -> float:
        """Pairs of query and key that attention computes, over those without a window: the mean of the layers.

        Causal over `positions`: of s²/2 pairs a window of w leaves s·w - w²/2.
        """
        inside = min(1.0, self.window / positions) if self.window else 1.0
        return self._mean_of_layers(inside * (2 - inside))

    def remembered(self, positions: int) -> float:
        """Share of `positions` cached keys and values that a new token's query reads: the mean of the layers."""
        return self._mean_of_layers(min(1.0, self.window / positions) if self.window else 1.0)

    def _mean_of_layers(self, windowed: float) -> float:
        """The mean of `windowed` in layers with a window and of 1 in those without."""
        whole = self.layers // self.window_every if self.window_every else 0
        return (whole + (self.layers - whole) * windowed) / self.layers

    def matmul_operations(self, tokens: int, seq: int, causal: bool = False) -> float:
        """Operations of one forward pass over `tokens` tokens in sequences of `seq`: matrix products only.

        Attention counts in full, as Megatron-LM's `num_floating_point_operations` did for the published rows, unless
        `causal`.
        """
        weights = self.layers * (self.D * (self.h + 2 * self.g) * self.d + self.h * self.d * self.D)
        mlp = (3 if self.gated else 2) * self.D * self.ffn
        weights += (self.layers - self.moe_layers) * mlp + self.moe_layers * (self.top_k * mlp + self.D * self.experts)
        attention = self.layers * 2 * self.h * self.d * seq * (0.5 if causal else 1.0) * self.attended(seq)
        return 2.0 * tokens * (weights + self.vocab * self.D + attention)
