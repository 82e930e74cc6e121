"""Between transformers' config of a decoder (Llama, Mistral, Qwen2) and a :class:`~vz_edge.recipe.DecoderSpec`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vz_edge.errors import CheckpointError, UnsupportedModelError
from vz_edge.host.fields import positive, whole_number
from vz_edge.host.rope import check_rope
from vz_edge.recipe import DecoderSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DECODER_TYPES = ("llama", "mistral", "qwen2")
TOKEN_TABLE = "language_model.embed_tokens.weight"


def head_name(spec: DecoderSpec) -> str:
    """The weight that makes logits, by its name in a checkpoint."""
    return TOKEN_TABLE if spec.tie_word_embeddings else "lm_head.weight"


def decoder_spec(text: PreTrainedConfig, *, tie_word_embeddings: bool) -> DecoderSpec:
    """The decoder in a ``text_config`` that transformers has completed.

    Raises UnsupportedModelError, CheckpointError.
    """
    config: Any = text
    if config.model_type not in DECODER_TYPES:
        raise UnsupportedModelError(
            f"decoder {config.model_type!r} is not supported; supported are {', '.join(DECODER_TYPES)}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(f"text_config.hidden_act {config.hidden_act!r} is not supported; only 'silu' is")
    # Of the three only Llama's class reads these two.
    bias, mlp_bias = (
        bool(getattr(config, name, False)) and config.model_type == "llama" for name in ("attention_bias", "mlp_bias")
    )
    rope_theta, rope_scaling = _rope(config)
    hidden_size, heads = (
        whole_number(f"text_config.{name}", getattr(config, name)) for name in ("hidden_size", "num_attention_heads")
    )
    kv_heads = whole_number("text_config.num_key_value_heads", config.num_key_value_heads or heads)
    head_dim = whole_number("text_config.head_dim", getattr(config, "head_dim", None) or hidden_size // heads)
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"config.json: text_config has {heads} heads of {head_dim} numbers over {kv_heads} key and value heads; "
            "expected heads of an even size, as many for each key and value head"
        )
    return DecoderSpec(
        type=config.model_type,
        hidden_size=hidden_size,
        intermediate_size=whole_number("text_config.intermediate_size", config.intermediate_size),
        layers=whole_number("text_config.num_hidden_layers", config.num_hidden_layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=whole_number("text_config.vocab_size", config.vocab_size),
        context_length=whole_number("text_config.max_position_embeddings", config.max_position_embeddings),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=positive("text_config.rms_norm_eps", config.rms_norm_eps),
        tie_word_embeddings=tie_word_embeddings,
        qkv_bias=bias or config.model_type == "qwen2",  # Qwen2 has them always, and says so nowhere
        output_bias=bias,
        mlp_bias=mlp_bias,
        sliding_window=_sliding_window(config),
    )


def decoder_config(spec: DecoderSpec, **others: Any) -> Any:
    """Transformers' config of a decoder; ``others`` are keys that the spec does not have, or that win over it.

    The ids of special tokens are none: they are the bundle's matter.
    """
    from transformers import AutoConfig

    keys: dict[str, Any] = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", **(spec.rope_scaling or {}), "rope_theta": spec.rope_theta},
        "sliding_window": spec.sliding_window,
        "attention_bias": spec.output_bias,
        "mlp_bias": spec.mlp_bias,
        "tie_word_embeddings": spec.tie_word_embeddings,
    }
    if spec.type == "qwen2":  # which has a window in its upper layers, and only where it is told to use it
        keys |= {"use_sliding_window": spec.sliding_window is not None, "max_window_layers": 0}
    return AutoConfig.for_model(spec.type, **(keys | others))


def _rope(config: Any) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling: transformers 5 has both in ``rope_parameters``, into which it reads the older keys."""
    parameters = dict(config.rope_parameters)
    theta = positive("text_config.rope_theta", parameters.pop("rope_theta", None))
    partial = parameters.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise UnsupportedModelError(f"text_config.partial_rotary_factor {partial} is not supported; only 1.0 is")
    parameters.pop("type", None)  # the name of rope_type before transformers 4.43
    check_rope(parameters)
    return theta, None if parameters["rope_type"] == "default" else parameters


def _sliding_window(config: Any) -> int | None:
    """The window of every layer, as transformers' class of that decoder takes it."""
    if config.model_type == "llama":
        return None
    if config.model_type == "qwen2":
        layer_types = set(config.layer_types or ())
        if len(layer_types) > 1:
            raise UnsupportedModelError(
                f"text_config.layer_types mixes {', '.join(sorted(layer_types))}; expected the same in every layer"
            )
        if layer_types == {"full_attention"} or not config.use_sliding_window:
            return None
    window = config.sliding_window
    return None if window is None else whole_number("text_config.sliding_window", window)
