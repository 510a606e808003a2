"""This script tells the memory of presets' steps, each as rank 0 of its GPUs: `measure_memory.py < presets.json`."""

import json
import sys

from memory import stated, step_memory
from nullgpu.counters import tell, without_cudnn
from nullgpu.ranks import rank_0_of

if __name__ == "__main__":
    without_cudnn()
    for preset, settings in json.load(sys.stdin).items():
        layout = stated(preset)
        with rank_0_of(layout.gpus) as here:
            tell(preset, step_memory(preset, layout.images, here, *settings))
