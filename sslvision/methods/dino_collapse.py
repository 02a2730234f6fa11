"""Telling when a teacher gives all images the same answer, and in which of the two ways."""

import math

INFORMATION = 0.1  # nats: below it the answers are as good as the same
SPREAD = 0.75  # of ln K: answers above it are uniform, below it on few prototypes


def name_collapse(*, entropy: float, information: float, prototypes: int, settled: bool) -> dict[str, str]:
    """Name the collapse the teacher is in, with likely causes and what to change; an empty dict if it is in none.

    Centering alone leads to uniform answers, sharpening alone to one prototype for all; either way an answer no longer
    tells anything about its image (DINO, section 5.3 and figure 7).

    Args:
        entropy: of an answer, on average, in nats.
        information: between answer and image, in nats: the entropy of the mean answer less the mean entropy.
        prototypes: K.
        settled: the network is past its first steps, in which answers are near uniform of necessity.
    """
    if information >= INFORMATION:
        return {}
    ln_k = math.log(prototypes)
    measured = f"its entropy is {entropy:.3g} nats of ln {prototypes} = {ln_k:.3g}, and it tells {information:.2g} of its image"
    if entropy < SPREAD * ln_k:
        return {
            "Single-prototype collapse": f"the teacher gives all images one answer, on about {math.exp(entropy):,.2g} of "
            f"{prototypes:,} prototypes ({measured}). The loss falls, but nothing is learned. Likely causes: the center "
            "does not keep up, the teacher is too sharp, or the learning rate is too high. Set center_momentum=0.9, raise "
            "teacher_temp or warm it up from a lower one, freeze the prototypes for longer (freeze_prototypes_epochs), or "
            "lower the learning rate."
        }
    if not settled:
        return {}
    return {
        "Uniform collapse": f"the teacher gives all images one answer, spread over all prototypes ({measured}). The loss "
        f"stays near ln {prototypes} = {ln_k:.3g}, and nothing is learned. Likely causes: the teacher is not sharp enough, "
        "or the learning rate is too high. Set teacher_temp well below student_temp (0.04 and 0.1 are usual), lower the "
        "learning rate, lengthen the warm-up, or raise momentum."
    }
