"""A believable vLLM 0.32.0 without weights.

Same routes, shapes, queue limits, metrics and ways to fail as the real engine, and text that is
a pure function of the token ids so far. It is for fast tests, drills and load work; it is never
the proof of compatibility, which is the real vLLM's to give.
"""
