"""The rival of the decoder benchmark: the same decoder's shape as llama.cpp's Q4_0, and a worker that runs it.

The file is what ``llama-quantize MODEL Q4_0`` writes: every matrix in Q4_0 (blocks of 32 numbers: an fp16
scale and 16 bytes of two 4-bit numbers each) but the output matrix in Q6_K (super-blocks of 256 numbers in
210 bytes), norms in fp32. The numbers are random with the deviation that a trained matrix has; the speed
does not depend on them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vz_edge.profiling.processes import serve
from vz_edge.recipe import DecoderSpec

Q4_0_VALUES, Q4_0_BYTES = 32, 18
Q6_K_VALUES, Q6_K_BYTES = 256, 210
UNIFORM_NIBBLE_DEVIATION = 4.6  # of the integers -8..7
UNIFORM_6_BIT_DEVIATION = 18.5  # of the integers -32..31
Q6_K_SCALE = 16
FIRST_WORD = 259  # after three special tokens and 256 bytes
ADDED_TOKENS = 64  # at the end of the vocabulary, the image token among them


def write_gguf(path: Path, decoder: DecoderSpec) -> None:
    """Write a random Llama of that shape; a file that is there is left as it is."""
    if path.exists():
        return
    import gguf

    writer = gguf.GGUFWriter(None, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(decoder.context_length)
    writer.add_embedding_length(decoder.hidden_size)
    writer.add_block_count(decoder.layers)
    writer.add_feed_forward_length(decoder.intermediate_size)
    writer.add_head_count(decoder.heads)
    writer.add_head_count_kv(decoder.kv_heads)
    writer.add_rope_dimension_count(decoder.head_dim)
    writer.add_rope_freq_base(decoder.rope_theta)
    writer.add_layer_norm_rms_eps(decoder.rms_norm_eps)
    writer.add_vocab_size(decoder.vocab_size)
    _add_tokenizer(writer, decoder.vocab_size)
    rng = np.random.default_rng(0)

    def add(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, _q4_0(rng, rows, columns), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(decoder.hidden_size, np.float32))

    hidden, mlp = decoder.hidden_size, decoder.intermediate_size
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    add("token_embd.weight", decoder.vocab_size, hidden)
    for number in range(decoder.layers):
        add(f"blk.{number}.attn_q.weight", queries, hidden)
        add(f"blk.{number}.attn_k.weight", keys, hidden)
        add(f"blk.{number}.attn_v.weight", keys, hidden)
        add(f"blk.{number}.attn_output.weight", hidden, queries)
        add(f"blk.{number}.ffn_gate.weight", mlp, hidden)
        add(f"blk.{number}.ffn_up.weight", mlp, hidden)
        add(f"blk.{number}.ffn_down.weight", hidden, mlp)
        add_norm(f"blk.{number}.attn_norm.weight")
        add_norm(f"blk.{number}.ffn_norm.weight")
    add_norm("output_norm.weight")
    output = _q6_k(rng, decoder.vocab_size, hidden)
    writer.add_tensor("output.weight", output, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def _add_tokenizer(writer, vocab_size: int) -> None:
    import gguf

    special = [("<unk>", gguf.TokenType.UNKNOWN), ("<s>", gguf.TokenType.CONTROL), ("</s>", gguf.TokenType.CONTROL)]
    byte_tokens = [(f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(256)]
    known = special + byte_tokens
    words = [(f"word{number}", gguf.TokenType.NORMAL) for number in range(vocab_size - len(known))]
    texts, types = zip(*(known + words)[:vocab_size], strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _q4_0(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random Q4_0 rows as bytes [rows, columns / 32 * 18]."""
    blocks = rows * columns // Q4_0_VALUES
    data = rng.integers(0, 256, (blocks, Q4_0_BYTES), dtype=np.uint8)
    scale = np.float16(columns**-0.5 / UNIFORM_NIBBLE_DEVIATION)
    data[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return data.reshape(rows, -1)


def _q6_k(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random Q6_K rows as bytes [rows, columns / 256 * 210]: low and high bits, 16 int8 scales, an fp16 scale."""
    blocks = rows * columns // Q6_K_VALUES
    data = rng.integers(0, 256, (blocks, Q6_K_BYTES), dtype=np.uint8)
    data[:, -18:-2] = Q6_K_SCALE
    scale = np.float16(columns**-0.5 / (UNIFORM_6_BIT_DEVIATION * Q6_K_SCALE))
    data[:, -2:] = np.frombuffer(scale.tobytes(), np.uint8)
    return data.reshape(rows, -1)


def random_ids(vocab_size: int, count: int) -> list[int]:
    """The same ordinary tokens (no special one, no byte, no added one) for every rival."""
    return np.random.default_rng(0).integers(FIRST_WORD, vocab_size - ADDED_TOKENS, count).tolist()


def prepare(path: Path, threads: int, flash_attention: bool) -> Callable[[dict], dict]:
    """Load the model; the returned function prefills ``prompt_tokens`` and decodes ``answer_tokens`` greedily."""
    import llama_cpp

    llama = llama_cpp.Llama(
        str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, flash_attn=flash_attention, verbose=True
    )
    vocab_size = llama.n_vocab()

    def logits() -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (vocab_size,))

    def measure(request: dict) -> dict:
        prompt = random_ids(vocab_size, request["prompt_tokens"])
        llama.reset()
        start = time.perf_counter()
        llama.eval(prompt)
        token = int(logits().argmax())
        prefilled = time.perf_counter()
        for _ in range(request["answer_tokens"]):
            llama.eval([token])
            token = int(logits().argmax())
        return {"prefill_sec": prefilled - start, "decode_sec": time.perf_counter() - prefilled}

    return measure


def main() -> None:
    """The worker that decoder_speed starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--flash-attention", action="store_true")
    arguments = parser.parse_args()
    serve(lambda: prepare(arguments.path, arguments.threads, arguments.flash_attention))


if __name__ == "__main__":
    main()
