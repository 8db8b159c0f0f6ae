"""What a cut may hold in memory beside the model, on each device, whatever the model's depth and width.

A peak of the model's own bytes, the activations of one calibration sequence in one layer, and 2 GiB is kept so:

| what | held on the device | beyond that |
|---|---|---|
| statistics of all layers | `STATISTICS` | Gramians and normal matrices are added up on the CPU |
| what the mixers read, for fits | `INPUTS` | on the CPU, in the model's own precision |
| systems that a layer is fitted to | `SYSTEMS` | computed anew in each pass of the fit |
| what its blocks give, to begin trials with | `OUTPUTS` | on the CPU |
| predictions of the full model | `PREDICTIONS` | made again from its last hidden states; on the CPU where the head will change, too |
| a forward pass | `ACTIVATIONS` in one layer, or one sequence | one sequence after the other |
| a backward pass | `CHECKPOINTS`, the inputs of all blocks | on the CPU |
| weights that a cut replaces, in case it is undone | `REPLACED` | on the CPU |
| factorisations | 0.6 GiB, see `factorisations` | in parts |

Mixers are cut as they run in trials, and their copies are gone afterwards.
"""

STATISTICS = 2**28
INPUTS = 2**28
SYSTEMS = 2**28
PREDICTIONS = 2**28
OUTPUTS = 2**27
ACTIVATIONS = 3 * 2**28
CHECKPOINTS = 3 * 2**28
REPLACED = 2**28
INPUTS_ON_CPU = 2**34
"""Of host memory: what does not fit is left out of the fits."""
