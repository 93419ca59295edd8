-- states(): for each state of a replica, the states that may follow it.
local function states()
  return {
    PENDING = { STARTING = true, FAILED = true },
    STARTING = { READY = true, DRAINING = true, FAILED = true },
    READY = { UNHEALTHY = true, DRAINING = true, FAILED = true },
    UNHEALTHY = { READY = true, DRAINING = true, FAILED = true },
    DRAINING = { STOPPED = true, FAILED = true },
    STOPPED = {},
    FAILED = {},
  }
end
