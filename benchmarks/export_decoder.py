"""Export only the decoder and the token table of a checkpoint: what the stock builder makes, for comparison.

    python -m benchmarks.export_decoder build/benchmarks/1b build/benchmarks/1b-decoder-export

The pieces are those of ``vz-edge export --bits 4 --target cpu --quantizer rtn``, as the builder rounds to nearest.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from vz_edge.bundle import default_weights
from vz_edge.host.checkpoint import Checkpoint
from vz_edge.host.decoder_graph import DecoderQuant, build_decoder
from vz_edge.host.embedding_graph import write_embedding
from vz_edge.host.families import spec_from_config
from vz_edge.host.quant import quant_config


def export_decoder(folder: Path, out: Path) -> None:
    """Write decoder.onnx, embedding.onnx and their data into ``out``."""
    checkpoint = Checkpoint.open(folder)
    model = spec_from_config(checkpoint.config)
    out.mkdir(parents=True, exist_ok=True)
    weights = replace(default_weights(4), quantizer="rtn")
    quant = DecoderQuant(quant_config(weights.bits, weights), quant_config(weights.lm_head_bits, weights))
    write_embedding(checkpoint, model, ir.DataType.FLOAT, out, lambda *_: None)
    build_decoder(checkpoint, model.decoder, ir.DataType.FLOAT, quant).save(out / "decoder.onnx", lambda *_: None)


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    export_decoder(arguments.checkpoint, arguments.out)


if __name__ == "__main__":
    main()
