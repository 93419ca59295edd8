-- settle(keys, book): write the totals that `charge` gathered.
--@include lib/digits
local function settle(keys, book)
  local charged = false
  for rid, account in pairs(book.accounts) do
    charged = true
    if account.requests > 0 then
      redis.call('HSET', keys.nreq, rid, digits(account.requests))
      redis.call('HSET', keys.cost, rid, digits(account.cost))
    else
      redis.call('HDEL', keys.nreq, rid)
      redis.call('HDEL', keys.cost, rid)
    end
  end
  if charged and book.total > 0 then
    redis.call('HSET', keys.nreq, '*', digits(book.total))
  elseif charged then
    redis.call('HDEL', keys.nreq, '*')
  end
end
