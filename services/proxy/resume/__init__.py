"""Resumable streams: generated on when their client or their proxy goes away.

`journal` collects a stream's events and lets the client see those that Redis has; `writing` brings
them there; `reading` sends them to whoever resumes; `room` knows the streams that this proxy
writes, and takes over those of a dead one; `api` is what clients call.
"""
