"""A stand-in bundle: the inputs and outputs of real graphs, made by hand in a few nodes, without torch.

The decoder has real attention with a real KV cache (two GroupQueryAttention layers with rotary positions), the
vision graph averages patches; all else of the bundle is as an export writes it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from vz_edge.budget import TokenBudget
from vz_edge.bundle import ImageSpec, Manifest, StopSpec, WeightSpec, write_manifest
from vz_edge.recipe import DecoderSpec, ModelSpec, TowerSpec

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 300, 32, 2, 1, 16, 2
SIDE, PATCH = 28, 14
PATCHES = (SIDE // PATCH) ** 2
BOS, EOS, IMAGE_TOKEN_ID = 256, 257, 299
CONTEXT = 256
BUDGET = TokenBudget(3, 1)
PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def write_bundle(
    folder: Path,
    family: str = "llava_next",
    budget: TokenBudget | None = BUDGET,
    target: str = "cpu",
    stop: StopSpec | None = None,
) -> Manifest:
    """Write a whole bundle that EdgeModel loads."""
    folder.mkdir(parents=True)
    model = model_spec(family)
    dtype = np.dtype(np.float32 if target == "cpu" else np.float16)
    onnx.save(vision_graph(family, budget, dtype), folder / "vision.onnx")
    onnx.save(decoder_graph(dtype), folder / "decoder.onnx")
    embedding().tofile(folder / "embedding.data")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    manifest = Manifest(
        format_version=1,
        created_by="tests",
        name="stand-in",
        checkpoint="none",
        model=model,
        target=target,  # type: ignore[arg-type]
        budget=budget,
        weights=WeightSpec(16, 16, 16, 32, "rtn"),
        image=ImageSpec("stock", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        stop=stop or StopSpec((EOS,), ()),
    )
    return write_manifest(folder, manifest, lambda name, count: None)


def model_spec(family: str = "llava_next") -> ModelSpec:
    decoder = DecoderSpec("llama", HIDDEN, 64, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB, CONTEXT)
    tower = TowerSpec(hidden_size=8, intermediate_size=8, layers=2, heads=1, image_size=SIDE, patch_size=PATCH)
    pinpoints = PINPOINTS if family == "llava_next" else ()
    return ModelSpec(family, decoder, IMAGE_TOKEN_ID, tower, grid_pinpoints=pinpoints)  # type: ignore[arg-type]


def embedding() -> np.ndarray:
    """fp16 [VOCAB, HIDDEN]."""
    return np.random.default_rng(1).standard_normal((VOCAB, HIDDEN)).astype(np.float16)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that every character beyond ASCII comes in pieces; ids 0 to 255 are the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    fillers = [AddedToken(f"<filler {i}>", special=True) for i in range(258, IMAGE_TOKEN_ID)]
    tokenizer.add_special_tokens([*fillers, AddedToken("<image>", special=True, normalized=False)])
    assert tokenizer.token_to_id("<image>") == IMAGE_TOKEN_ID
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def vision_graph(family: str, budget: TokenBudget | None, dtype: np.dtype) -> onnx.ModelProto:
    """Patch means times a matrix. With a budget: the first patches of each tile, shifted by the grid's width."""
    rng = np.random.default_rng(2)
    precision = helper.np_dtype_to_tensor_dtype(dtype)
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["tiles", 3, SIDE, SIDE])]
    outputs = [helper.make_tensor_value_info("image_features", precision, ["tokens", HIDDEN])]
    constants = {
        "projection": rng.standard_normal((3, HIDDEN)).astype(np.float32),
        "newline": rng.standard_normal((1, HIDDEN)).astype(np.float32),
        "rows": np.array([-1, 3], np.int64),
        "kept_row": np.array([[0, 2, 3]], np.int64),
        "zero": np.array(0, np.int64),
        "one": np.array([1], np.int64),
        "dominant": np.array([3], np.int64),
    }
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[PATCH] * 2, strides=[PATCH] * 2),
        helper.make_node("Transpose", ["pooled"], ["channels_last"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["channels_last", "rows"], ["patches"]),
        helper.make_node("MatMul", ["patches", "projection"], ["projected"]),
    ]
    result = "projected"
    if budget is not None:
        assert budget.per_tile == PATCHES
        outputs.append(helper.make_tensor_value_info("kept", TensorProto.INT64, ["tiles", budget.dominant]))
        nodes += [
            helper.make_node("Shape", ["pixel_values"], ["tile_count"], start=0, end=1),
            helper.make_node("Concat", ["tile_count", "dominant"], ["kept_shape"], axis=0),
            helper.make_node("Expand", ["kept_row", "kept_shape"], ["kept"]),
        ]
    if family == "llava_next" and budget is not None:
        inputs.append(helper.make_tensor_value_info("grid_width", TensorProto.INT64, [1]))
        nodes += [
            helper.make_node("Cast", ["grid_width"], ["width"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["projected", "width"], ["shifted"]),
        ]
        result = "shifted"
    elif family == "llava_next":
        inputs.append(helper.make_tensor_value_info("token_order", TensorProto.INT64, ["tokens"]))
        nodes += [
            helper.make_node("Concat", ["projected", "newline"], ["all"], axis=0),
            helper.make_node("Gather", ["all", "token_order"], ["ordered"]),
        ]
        result = "ordered"
    nodes.append(helper.make_node("Cast", [result], ["image_features"], to=precision))
    return _model(nodes, inputs, outputs, constants)


def decoder_graph(dtype: np.dtype) -> onnx.ModelProto:
    """Residual attention layers and a head over the last position."""
    rng = np.random.default_rng(3)
    precision = helper.np_dtype_to_tensor_dtype(dtype)
    angles = np.arange(CONTEXT)[:, None] / 100.0 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    constants = {
        "cos": np.cos(angles).astype(dtype),
        "sin": np.sin(angles).astype(dtype),
        "one": np.array(1, np.int64),
        "axis": np.array([1], np.int64),
        "last": np.array([-1], np.int64),
        "head": (rng.standard_normal((HIDDEN, VOCAB)) * 0.5).astype(dtype),
    }
    inputs = [
        helper.make_tensor_value_info("inputs_embeds", precision, [1, "n", HIDDEN]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "total"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, VOCAB])]
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "axis"], ["valid"], keepdims=0),
        helper.make_node("Sub", ["valid", "one"], ["last_index"]),
        helper.make_node("Cast", ["last_index"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_length"], start=1, end=2),
        helper.make_node("Squeeze", ["mask_length"], ["mask_scalar"]),
        helper.make_node("Cast", ["mask_scalar"], ["total_length"], to=TensorProto.INT32),
    ]
    hidden = "inputs_embeds"
    for layer in range(LAYERS):
        for name, width in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weight = rng.standard_normal((HIDDEN, width * HEAD_DIM)) * HIDDEN**-0.5
            constants[f"{name}{layer}"] = weight.astype(dtype)
            nodes.append(helper.make_node("MatMul", [hidden, f"{name}{layer}"], [f"{name}{layer}.out"]))
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        shape: list = [1, KV_HEADS, "past", HEAD_DIM]
        inputs += [helper.make_tensor_value_info(name, precision, shape) for name in past]
        outputs += [
            helper.make_tensor_value_info(name, precision, [1, KV_HEADS, "present", HEAD_DIM]) for name in present
        ]
        nodes += [
            helper.make_node(
                "GroupQueryAttention",
                [*(f"{name}{layer}.out" for name in "qkv"), *past, "seqlens_k", "total_length", "cos", "sin"],
                [f"attention{layer}", *present],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                do_rotary=1,
            ),
            helper.make_node("Add", [hidden, f"attention{layer}"], [f"hidden{layer}"]),
        ]
        hidden = f"hidden{layer}"
    nodes += [
        helper.make_node("Gather", [hidden, "last"], ["last_hidden"], axis=1),
        helper.make_node("MatMul", ["last_hidden", "head"], ["raw_logits"]),
        helper.make_node("Cast", ["raw_logits"], ["logits"], to=TensorProto.FLOAT),
    ]
    return _model(nodes, inputs, outputs, constants)


def _model(nodes: list, inputs: list, outputs: list, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    used = {name for node in nodes for name in node.input}
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used]
    graph = helper.make_graph(nodes, "stand-in", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
