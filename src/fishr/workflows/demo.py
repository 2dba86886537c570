"""The demo: ERM against Fishr on Colored Digits, embedded and offline."""

from fishr.workflows.colored import Setting, Spread

METHODS = ("erm", "fishr")


def setting(steps: int) -> Setting:
    """The Colored MNIST protocol in small."""
    return Setting("colored-digits", width=128, lr=1e-3, l2=1e-3, penalty_weight=9e4, steps=steps)


def conclusion(erm: Spread, fishr: Spread) -> str:
    """What the numbers show, in one sentence."""
    drop_erm, drop_fishr = erm.mean[0] - erm.mean[1], fishr.mean[0] - fishr.mean[1]
    facts = (
        f"from the training domains to the unseen one, where color misleads, ERM goes from {erm.mean[0]:.0f} % to "
        f"{erm.mean[1]:.0f} % and Fishr from {fishr.mean[0]:.0f} % to {fishr.mean[1]:.0f} %"
    )
    if fishr.mean[1] > erm.mean[1] and drop_fishr < drop_erm:
        return f"Fishr holds up where ERM does not: {facts}."
    return f"Fishr does not hold up better than ERM here: {facts}."
