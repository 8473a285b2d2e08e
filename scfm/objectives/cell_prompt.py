"""Cell prompt: predict the values of unknown genes in a second pass that starts from the cell embedding."""

from __future__ import annotations

from scfm.objectives.gep import GEP


class CellPrompt(GEP):
    """GEP of a second pass in which the first pass's detached cell embedding stands for `<cls>` (scGPT pretraining).

    Reads `output.predictions["cell_prompt"]`, where the training module puts the second pass's `gep` predictions.
    """

    name = "cell_prompt"
    needs_second_pass = True
