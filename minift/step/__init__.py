"""Step through any reference function: `step(lora.forward, x, W, A, B)` records it, `show(recording)` displays it."""

from minift.step.notebook import show
from minift.step.recorder import Recording, Step, step

__all__ = ["Recording", "Step", "show", "step"]
