-- Idle workers: parked where they may claim, and woken one at a time; some offer slots there (``handoff``). A worker of a
-- region is parked at each queue key twice, for its region and for all. Where a worker serves many queues, its entries
-- there stand for a while (``stands_until`` in its ``claimed`` hash): a claim does not write them again, and once its offer
-- is used up it is only marked as ``full``.
-- uses: records

local nobody_at = {} -- queue keys at which this call found nobody parked

-- Wakes the worker that parked first at a queue key, or ``preferred``, unless it is gone. Answers whether there was one.
local function wake(key, now, preferred)
  for _ = 1, nobody_at[key] and 0 or 64 do
    local popped = preferred and call('ZREM', P .. 'parked:' .. key, preferred) == 1 and { preferred, now }
      or call('ZPOPMIN', P .. 'parked:' .. key)
    preferred = nil
    nobody_at[key] = not popped[1]
    if nobody_at[key] then return false end
    local claimed = P .. 'claimed:' .. popped[1]
    local of = call('HMGET', claimed, 'stands_until', 'full')
    if of[1] then call('HDEL', claimed, 'stands_until') end
    if tonumber(popped[2]) >= now and not of[2]
      and call('XADD', P .. 'ctl:' .. popped[1], 'NOMKSTREAM', '*', 'k', 'wake') then
      if without_region(key) ~= key then call('ZREM', P .. 'parked:' .. without_region(key), popped[1]) end
      return true
    end
  end
  return false
end

-- Whether a worker is parked at a queue key, and so has a free slot.
local function is_parked_at(key, now)
  for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'parked:' .. key, int(now), '+inf', 'LIMIT', 0, 16)) do
    if not call('HGET', P .. 'claimed:' .. id, 'full') then return true end
  end
  return false
end

-- What part of the slots that a worker may have is busy, by its claim: workers whose slots have grown apart are loaded alike.
local function load_of(slots, free, capacity)
  return math.max(slots - free, 0) / math.max(capacity, slots, free, 1)
end

-- ``parked``: the queue keys at which a worker is parked, as its ``claimed`` hash says them.
local function unpark(session_id, parked)
  if not parked then return end
  for key in string.gmatch(parked, '%S+') do
    call('ZREM', P .. 'parked:' .. key, session_id)
    call('ZREM', P .. 'offers:' .. key, session_id)
  end
  call('HDEL', P .. 'claimed:' .. session_id, 'parked', 'stands_until')
end
