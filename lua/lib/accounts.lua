-- accounts(keys): the books of a batch: what is outstanding on some replicas and on the model, read
-- before the first operation and written after the last. An account is a number: its replica's place
-- in `names`, by replica id in `at`. `places` are the scores of those that can be chosen: whoever
-- chooses puts them there, `charge` keeps them true and notes in `touched` which it changed. The
-- functions are closures over plain lists, because in Lua a field costs several times as much.
--@include lib/whole
--@include lib/rates
--@include lib/score
local function accounts(keys)
  local format, unpack = string.format, unpack
  local names, at, places, touched, charged, scores = {}, {}, {}, {}, {}, {}
  local requests, costs, weights, known, weighed, rate = {}, {}, {}, {}, nil, nil
  local total, charges, touches = 0, 0, 0

  -- read(first): read the accounts from number `first` on, and the model's total.
  local function read(first)
    local count = #names
    names[count + 1] = '*'
    local outstanding = redis.call('HMGET', keys.nreq, unpack(names, first))
    local tokens = redis.call('HMGET', keys.cost, unpack(names, first))
    local texts = redis.call('HMGET', keys.weight, unpack(names, first))
    names[count + 1] = nil
    if first == 1 then
      requests, costs, weights = outstanding, tokens, texts
      total = whole(outstanding[count + 1], 0, 0, 1e9)
    else
      for account = first, count do
        local index = account - first + 1
        requests[account], costs[account] = outstanding[index], tokens[index]
        weights[account] = texts[index]
      end
    end
  end

  -- rated(account): inverse throughput, cap and penalty.
  local function rated(account)
    return rates(weights[account], known)
  end

  -- charge(account, change, tokens): change what is outstanding by `change` requests and `tokens`. No
  -- total falls below zero, and a replica without requests holds no cost.
  local function charge(account, change, tokens)
    local outstanding, cost = requests[account], costs[account]
    if not scores[account] then
      outstanding = outstanding and whole(outstanding, 0, 0, 1e9) or 0
      cost = cost and whole(cost, 0, 0, 4e15) or 0
      charges = charges + 1
      charged[charges] = account
    end
    outstanding, cost = outstanding + change, cost + tokens
    if outstanding <= 0 then
      outstanding, cost = 0, 0
    elseif cost < 0 then
      cost = 0
    end
    total = total + change
    if total < 0 then
      total = 0
    end
    local weight = weights[account]
    if weight ~= weighed then
      weighed, rate = weight, rates(weight, known)
    end
    local place = score(cost, outstanding, rate)
    requests[account], costs[account], scores[account] = outstanding, cost, place
    if places[account] then
      touches = touches + 1
      places[account], touched[touches] = place, account
    end
  end

  -- settle(): write the totals and scores that `charge` changed. Scores come first: the other keys
  -- have been read, so that whatever is wrong with a key shows before the first write.
  local function settle()
    local placed, counts, sums, idle, last = {}, {}, {}, {}, 0
    for index = 1, charges do
      local account = charged[index]
      local rid, outstanding = names[account], requests[account]
      placed[2 * index - 1], placed[2 * index] = format('%d', scores[account]), rid
      if outstanding > 0 then
        counts[last + 1], counts[last + 2] = rid, format('%d', outstanding)
        sums[last + 1], sums[last + 2] = rid, format('%d', costs[account])
        last = last + 2
      else
        idle[#idle + 1] = rid
      end
    end
    if charges == 0 then
      return
    end
    redis.call('ZADD', keys.ready, 'XX', unpack(placed))
    if last > 0 then
      redis.call('HSET', keys.cost, unpack(sums))
    end
    if #idle > 0 then
      redis.call('HDEL', keys.cost, unpack(idle))
    end
    if total > 0 then
      redis.call('HSET', keys.nreq, '*', format('%d', total), unpack(counts))
    else
      idle[#idle + 1] = '*'
    end
    if #idle > 0 then
      redis.call('HDEL', keys.nreq, unpack(idle))
    end
  end

  -- full(cap): whether the model has `cap` requests.
  local function full(cap)
    return total >= cap
  end

  return {
    names = names, at = at, places = places, touched = touched, read = read, rated = rated,
    charge = charge, settle = settle, full = full,
  }
end
