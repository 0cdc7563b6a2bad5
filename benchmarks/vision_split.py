# SPDX-License-Identifier: Apache-2.0
"""Speed-up from dividing the frozen vision encoder's work between tensor- or context-parallel ranks.

    python benchmarks/vision_split.py [--ranks 2] [--tiles 7] [--quick] [--json]

The ranks (the program starts itself under torchrun, one thread each) hold the same tiles, as tensor- and
context-parallel ranks do. Two passes alternate: in one each rank encodes all tiles, in the other each rank encodes its
share and the features are gathered (`VisionEncoder.encode`, as the model calls it). The results are the median and the
quartiles over pairs of the ratio of the two times, and the largest difference of a feature. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="Processes. Default: %(default)s.")
    parser.add_argument("--tiles", type=int, default=7, help="Tiles of a micro-batch. Default: %(default)s.")
    parser.add_argument("--image-size", type=int, default=448, help="Side of a tile. Default: %(default)s.")
    parser.add_argument("--hidden", type=int, default=256, help="The encoder's width. Default: %(default)s.")
    parser.add_argument("--layers", type=int, default=4, help="The encoder's layers. Default: %(default)s.")
    parser.add_argument("--pairs", type=int, help="Pairs of passes. Default: 12, with --quick 3.")
    parser.add_argument("--quick", action="store_true", help="Few pairs, within a minute.")
    parser.add_argument("--json", action="store_true", help="One JSON object as the last line.")
    options = parser.parse_args()
    options.ranks = int(os.environ.get("WORLD_SIZE", options.ranks))
    options.pairs = options.pairs or (3 if options.quick else 12)
    for name in ("ranks", "pairs"):
        if getattr(options, name) < 2:
            parser.error(f"--{name} {getattr(options, name)} leaves nothing to compare; give 2 or more.")
    for name in ("tiles", "layers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1.")
    if options.hidden % 64:
        parser.error(f"--hidden {options.hidden} must be a multiple of 64, the size of an attention head.")
    if options.image_size % 28:
        parser.error(f"--image-size {options.image_size} must be a multiple of 28: patches of 14, two to a token.")
    return options


def main() -> None:
    """Runs the benchmark and prints its results."""
    options = parse()
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # ranks that wait must not spin
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        os.execv(sys.executable, [sys.executable, *launch, *sys.argv])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_smar import runtime

    device = runtime.install()
    import torch
    import torch.distributed as dist
    from transformers import InternVLVisionConfig, InternVLVisionModel

    from megatron_smar.model.vision import VisionConfig, VisionEncoder

    torch.manual_seed(1)  # the same weights and tiles on every rank
    sizes = {
        "image_size": [options.image_size] * 2,
        "patch_size": [14, 14],
        "num_attention_heads": options.hidden // 64,
    }
    config = InternVLVisionConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        intermediate_size=4 * options.hidden,
        **sizes,
    )
    with tempfile.TemporaryDirectory() as folder:  # before there are process groups: with them only one rank would save
        InternVLVisionModel(config).save_pretrained(folder)
        encoder = VisionEncoder(VisionConfig(folder, options.image_size), torch.float32)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    encoder.cuda()
    tiles = torch.randn(options.tiles, 3, options.image_size, options.image_size).cuda()
    group = dist.group.WORLD
    assert group is not None
    full, shared = (lambda: encoder(tiles)), (lambda: encoder.encode(tiles, group))
    difference = float((full() - shared()).abs().max())

    def timed(work: Callable[[], object]) -> float:
        dist.barrier()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        dist.barrier()  # the slowest rank decides
        return time.perf_counter() - begin

    ratios = []
    for pair in range(options.pairs):
        first, second = (full, shared) if pair % 2 == 0 else (shared, full)
        times = {first: timed(first), second: timed(second)}
        ratios.append(times[full] / times[shared])
    if dist.get_rank() == 0:
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        ideal = options.tiles / -(-options.tiles // options.ranks)
        print(f"{options.tiles} tiles of {options.image_size} px on {options.ranks} ranks ({device})")
        print(f"  speed-up, median of {options.pairs} pairs   {median:.3f}   quartiles {lower:.3f} to {upper:.3f}")
        print(f"  most possible                {ideal:.3f}")
        print(f"  largest difference           {difference:.1e}")
        if options.json:
            result = {"ratio": median, "quartiles": [lower, upper], "ideal": ideal, "difference": difference}
            print(json.dumps(result | {"ranks": options.ranks, "tiles": options.tiles, "device": device}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
