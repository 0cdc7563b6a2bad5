# SPDX-License-Identifier: Apache-2.0
"""Builds model and optimizer like a run on a simulated CUDA device, and writes the optimizers' types and state.

python tests/cuda_path/construct.py RESULT FLAGS...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import redirected_cuda


def main() -> None:
    """Builds them and writes the result. No training step runs: the kernels of the optional packages need a GPU."""
    result, flags = Path(sys.argv[1]), sys.argv[2:]
    redirected_cuda.claim_cuda()
    from megatron_smar import runtime

    runtime.install()
    redirected_cuda.stand_for_the_device_in_megatron()
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.training import get_args

    from megatron_smar.training.setup import start

    (chunk,), optimizer, _ = start(flags)
    args = get_args()
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }
    state = optimizer.sharded_state_dict(chunk.sharded_state_dict(), is_loading=True, metadata=metadata)
    names = sorted(part.key for part in nested_values(state) if isinstance(part, ShardedTensor))
    parts = [type(part.optimizer).__name__ for part in optimizer.chained_optimizers]
    chosen = ("transformer_impl", "apply_rope_fusion", "gradient_accumulation_fusion", "moe_router_dtype")
    result.write_text(
        json.dumps({"optimizers": parts, "state": names, "flags": {name: getattr(args, name) for name in chosen}})
    )


if __name__ == "__main__":
    main()
