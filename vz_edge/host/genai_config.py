"""genai_config.json: how stock ONNX Runtime GenAI runs the bundle, from Python, C++, C# or Java.

The bundle is given as a ``phi3v`` model, GenAI's type for a picture's features put among a Llama-like decoder's
embeddings. GenAI's own processor for that type prepares Phi's tiles, not LLaVA's, so the pixels go in through
``Generator.set_inputs`` as named tensors: pixel_values, num_image_tokens, input_ids, and grid_width where the
vision graph has that input (GenAI passes it on by its name).

Source: ONNX Runtime GenAI's reference of genai_config.json.
"""

from __future__ import annotations

from typing import Any, Literal

from vz_edge.host.head_padding import HeadPadding
from vz_edge.recipe import ModelSpec


def genai_config(model: ModelSpec, stop_token_ids: tuple[int, ...], target: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """The content of genai_config.json for a bundle of ``model``."""
    decoder = model.decoder
    session = _session_options(target)
    return {
        "model": {
            "type": "phi3v",
            "context_length": decoder.context_length,
            "vocab_size": decoder.vocab_size,
            "eos_token_id": list(stop_token_ids),
            "pad_token_id": stop_token_ids[0] if stop_token_ids else 0,
            "decoder": {
                "session_options": session,
                "filename": "decoder.onnx",
                "hidden_size": decoder.hidden_size,
                "head_size": HeadPadding.of(decoder).stored,
                "num_attention_heads": decoder.heads,
                "num_key_value_heads": decoder.kv_heads,
                "num_hidden_layers": decoder.layers,
                "inputs": {
                    "inputs_embeds": "inputs_embeds",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
            "embedding": {
                "session_options": session,
                "filename": "embedding.onnx",
                "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
                "outputs": {"inputs_embeds": "inputs_embeds"},
            },
            "vision": {
                "session_options": session,
                "filename": "vision.onnx",
                "inputs": {"pixel_values": "pixel_values"},
                "outputs": {"image_features": "image_features"},
            },
        },
        "search": {
            "do_sample": False,
            "max_length": decoder.context_length,
            "past_present_share_buffer": True,
        },
    }


def _session_options(target: Literal["cpu", "cuda"]) -> dict[str, Any]:
    providers: list[dict[str, Any]] = [{"cuda": {}}] if target == "cuda" else []
    # GenAI takes one thread unless told; 0 is ONNX Runtime's own choice, a thread a core.
    return {"log_id": "vz-edge", "intra_op_num_threads": 0, "provider_options": providers}
