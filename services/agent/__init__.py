"""The agent: one per host. It starts engines as ordered, watches them, and outlives none of them.

Engines outlive the agent, not the other way round: an agent that is killed and started again
adopts what runs. Deciding (`launch`, `reconcile`, `health`) is pure; doing stands beside it.
"""
