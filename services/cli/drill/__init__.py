"""Drills: rehearsed failures, each with a stated expectation, judged by what was seen."""
