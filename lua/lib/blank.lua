-- blank(keys): a book without accounts, which `accounts` fills. `loose` are the accounts that a
-- batch names or has charged, `fresh` those that were read from `ready` in the order of scores.
--@include lib/whole
local function blank(keys)
  return {
    total = whole(redis.call('HGET', keys.nreq, '*'), 0, 0, 1e9),
    at = {}, names = {}, requests = {}, costs = {}, weights = {}, places = {}, scores = {},
    charged = {}, loose = {}, fresh = {}, ties = {}, rates = {}, rank = 0, limit = 0,
  }
end
