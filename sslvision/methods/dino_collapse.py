"""The collapse of a DINO teacher, named from its logged metrics (Caron et al. 2021, section 5.3)."""

import math

COLLAPSED = 0.1  # nats of mutual information below which the teacher's outputs are as good as the same for all images
SPREAD = 0.75  # of ln K: the entropy above which a collapse is uniform; below it, on few prototypes


def name_collapse(*, entropy: float, information: float, prototypes: int, settled: bool) -> dict[str, str]:
    """Name the collapse of the teacher, with likely causes and remedies; an empty dict if there is none.

    Centering alone leads to uniform outputs, sharpening alone to one prototype for all images. Either way an output tells
    nothing about its image any more (section 5.3, figure 7).

    Args:
        entropy: Mean entropy of an output, in nats.
        information: Mutual information of output and image, in nats: entropy of the mean output less the mean entropy.
        prototypes: K.
        settled: Whether the first epochs, in which outputs are necessarily near uniform, are over.
    """
    if information >= COLLAPSED:
        return {}
    ln_k = math.log(prototypes)
    measured = f"entropy {entropy:.3g} nats of ln {prototypes} = {ln_k:.3g}, mutual information {information:.2g} nats"
    if entropy < SPREAD * ln_k:
        return {
            "Single-prototype collapse": "the teacher gives all images the same output, on about "
            f"{math.exp(entropy):,.2g} of {prototypes:,} prototypes ({measured}). The loss falls, but nothing is learned. "
            "Likely causes: the center does not keep up, the teacher's temperature is too low, or the learning rate is too "
            "high. Set center_momentum=0.9, raise teacher_temp or warm it up from a lower value, freeze the prototypes for "
            "longer (freeze_prototypes_epochs), or lower the learning rate."
        }
    if not settled:
        return {}
    return {
        "Uniform collapse": "the teacher gives all images the same output, spread over all prototypes "
        f"({measured}). The loss stays near ln {prototypes} = {ln_k:.3g}, and nothing is learned. Likely causes: the "
        "teacher's temperature is too high, or the learning rate is. Set teacher_temp well below student_temp (0.04 and 0.1 "
        "are usual), lower the learning rate, lengthen the warm-up, or raise momentum."
    }
