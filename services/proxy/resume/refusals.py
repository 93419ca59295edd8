"""What clients of resumable streams are told when they cannot have what they asked for."""

from services.proxy.refusals import Refusal


def cannot_resume(reason: str) -> Refusal:
    """400: the request asks for a resumable stream and cannot have one."""
    return Refusal(
        status=400,
        message=f"this request cannot be resumable: {reason}; change it, or send it without "
        "the header X-Redmesh-Resumable",
        code="not_resumable",
        param="x-redmesh-resumable",
    )


def too_many(limit: int) -> Refusal:
    """429: this proxy keeps as many as it may."""
    return Refusal(
        status=429,
        message=f"this proxy serves {limit} resumable streams already, which is its limit: try "
        "again later, or without the header X-Redmesh-Resumable",
        type="rate_limit_error",
        code="too_many_resumable_streams",
        retry_after_s=1,
    )


def unknown_stream() -> Refusal:
    """404: no such stream for this caller."""
    return Refusal(
        status=404,
        message="there is no such stream, or it is too old, was cancelled, or is not yours: resume "
        "with the credential that began it, or send the request again",
        code="stream_not_found",
    )


def bad_event_id() -> Refusal:
    """400: `Last-Event-ID` is no number."""
    return Refusal(
        status=400,
        message="Last-Event-ID must be the `id` of the last event that was received, a whole "
        "number; leave it out to read from the start",
        code="invalid_last_event_id",
        param="last-event-id",
    )


def unknown_event(last: int) -> Refusal:
    """400: the journal does not reach that far."""
    return Refusal(
        status=400,
        message=f"Last-Event-ID is beyond the journal, which ends with event {last}: resume from "
        "there or before, or send the request again",
        code="unknown_event",
        param="last-event-id",
    )


def journal_away() -> Refusal:
    """503: Redis cannot be asked."""
    return Refusal(
        status=503,
        message="the journal of streams cannot be read now: try again",
        type="service_unavailable_error",
        code="journal_unavailable",
        retry_after_s=1,
    )


def cancelled() -> Refusal:
    """End a stream that its caller cancelled."""
    return Refusal(
        status=499,
        message="the stream was cancelled by its owner",
        code="stream_cancelled",
    )
