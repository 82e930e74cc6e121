"""The one entry point: every model on every device gives a whole prediction, and it behaves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vz_edge.bundle import default_weights
from vz_edge.errors import DeviceError
from vz_edge.planning.devices import device_names, load_device
from vz_edge.planning.predict import Prediction, predict
from vz_edge.recipe import load_recipe, recipe_names

MODELS = {name: load_recipe(name) for name in recipe_names()}
DEVICES = {name: load_device(name) for name in device_names()}


def of(name: str, bits: int, tokens: int | None, device: str, runtime: str = "onnxruntime", **more: int) -> Prediction:
    asked = {"prompt_tokens": 70, "answer_tokens": 32} | more
    return predict(MODELS[name].model, default_weights(bits), tokens, None, DEVICES[device], runtime, **asked)


@pytest.mark.parametrize("device", device_names())
def test_every_model_is_predicted_on_every_device(device: str) -> None:
    for name, recipe in MODELS.items():
        for tokens in (None, recipe.tokens):
            found = of(name, 4, tokens, device)
            assert found.memory.peak_bytes > 0 and all(size >= 0 for size in found.memory.parts.values())
            assert min(found.preprocess_sec, found.vision_sec, found.prefill_sec, found.decode_sec_per_token) > 0
            assert found.ttft_sec == found.preprocess_sec + found.vision_sec + found.prefill_sec
            assert found.answer_sec == pytest.approx(found.ttft_sec + 31 / found.tokens_per_sec)


def test_a_13b_with_a_tenth_of_the_tokens_beats_the_vanilla_7b_on_the_processor() -> None:
    """Both at 4 bits. The bar for the measurement is 2.5 times."""
    vanilla, ours = of("llava-next-7b", 4, None, "cpu"), of("llava-next-13b", 4, 320, "cpu")
    assert vanilla.ttft_sec / ours.ttft_sec > 2.5


def test_the_papers_13b_at_4_bits_needs_half_of_the_vanilla_7b() -> None:
    vanilla = of("llava-next-7b", 16, None, "a800-80", "transformers")
    ours = of("llava-next-13b", 4, 320, "a800-80", "transformers")
    assert 0.45 < ours.memory.peak_bytes / vanilla.memory.peak_bytes < 0.6


@settings(deadline=None)
@given(
    st.sampled_from(["agx-orin-64", "rtx-4090-24", "cpu"]),
    st.sampled_from([160, 320, 640]),
    st.integers(1, 1000),
    st.integers(2, 500),
)
def test_more_tokens_take_longer(device: str, tokens: int, prompt: int, answer: int) -> None:
    fewer = of("llava-next-7b", 4, tokens, device, prompt_tokens=prompt, answer_tokens=answer)
    more = of("llava-next-7b", 4, 2 * tokens, device, prompt_tokens=prompt, answer_tokens=answer)
    assert fewer.prefill_sec <= more.prefill_sec and fewer.decode_sec_per_token < more.decode_sec_per_token
    assert fewer.vision_sec <= more.vision_sec and fewer.memory.peak_bytes <= more.memory.peak_bytes


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(DeviceError, match="no figures of transformers on a device of class cpu"):
        of("llava-next-7b", 4, 320, "cpu", "transformers")
    with pytest.raises(DeviceError, match="no memory model for runtime 'mlc'; there are: onnxruntime, transformers"):
        of("llava-next-7b", 4, 320, "agx-orin-64", "mlc")
