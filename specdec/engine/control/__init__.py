"""How much to draft: policies, what they estimate and when they explore. Read `policy.py` first."""

from specdec.engine.control.estimate import Track
from specdec.engine.control.plan import EXPLORE, Plan
from specdec.engine.control.policy import Adaptive, Decisions, Fixed, Policy, policy_of

__all__ = ["EXPLORE", "Adaptive", "Decisions", "Fixed", "Plan", "Policy", "Track", "policy_of"]
