-- Hands new jobs to parked workers. ``offers:<queue key>``: sessions that take jobs there without claiming them, by load
-- (``load_of``); how many each takes is ``free`` in its ``claimed`` hash, and ``given`` counts them. A job travels on the
-- worker's control stream, and is leased from the moment that it is written there. Where a worker holds a job's prefix,
-- and its load is within a bound, it is preferred (``affinity``).
-- uses: affinity, parking
-- rarely: warmest

local MAX_TAKERS = 16 -- of a queue key, looked at in one call
local MAX_HANDED_BYTES = 262144 -- a larger envelope waits to be claimed
local FULL = 1e6 -- a load beyond any: of one that stands among the parked, but offers nothing
local takers, takers_at = {}, {}

-- The worker behind a session that offers slots; false if it does not any more.
local function taker(session_id)
  if takers[session_id] == nil then
    local claimed = call('HMGET', P .. 'claimed:' .. session_id, 'free', 'given', 'region', 'stands_until', 'cache', 'slots',
      'capacity')
    local free = tonumber(claimed[1] or 0)
    takers[session_id] = (free > 0 or claimed[4])
      and { id = session_id, free = free, given = tonumber(claimed[2] or 0), region = claimed[3] or '', stands = claimed[4],
        cache = cache_of(session_id, claimed[5] or '0'), slots = math.max(tonumber(claimed[6] or 0), free),
        capacity = tonumber(claimed[7] or 0), here = 0, keys = {} }
  end
  return takers[session_id]
end

-- Whether one worker is handed work before another: the one with the lower load, then the one that offers more.
local function goes_before(one, other)
  local load, load_there = load_of(one.slots, one.free, one.capacity), load_of(other.slots, other.free, other.capacity)
  if load ~= load_there then return load < load_there end
  return one.free > other.free or one.free == other.free and one.id < other.id
end

-- The worker that is handed work first among those that offer slots at a queue key.
local function least_loaded(key)
  takers_at[key] = takers_at[key] or call('ZRANGE', P .. 'offers:' .. key, 0, MAX_TAKERS - 1)
  local best = nil
  for _, session_id in ipairs(takers_at[key]) do
    local found = taker(session_id)
    if not found then
      gather('ZREM', P .. 'offers:' .. key, session_id)
    elseif found.free > 0 then
      if not best or goes_before(found, best) then best = found end
    elseif found.stands and not found.is_last and #takers_at[key] == MAX_TAKERS then
      call('ZADD', P .. 'offers:' .. key, 'XX', FULL, session_id)
      found.is_last = true
    end
  end
  return best
end

-- The slots of a worker that are free now: more than it offers, if jobs have ended since it claimed.
local function free_now(one)
  one.leases = one.leases or call('HLEN', P .. 'leases:' .. one.id)
  return math.max(one.slots - one.leases - one.here, one.free)
end

-- Whether a worker that has ``passed`` digests of a job less than all may be preferred to ``best``: ``takes_warm`` says why.
local function takes_warm(one, best, total, passed)
  return 2 * total * (free_now(one) + 1) * best.slots > free_now(best) * (total + passed) * one.slots
end

-- The freest of the workers that hold a job's longest known prefix; nil if they are loaded too much beside ``best``.
local function warmest(key, digests, best)
  local found, most, total = nil, 0, #digests / DIGEST_CHARS
  read_warm({ digests }, MAX_DIGESTS)
  local held, passed = match_prefix(digests, MAX_DIGESTS)
  for session_id in string.gmatch(held or '', '(%S+)#%d*') do
    local holder = taker(session_id)
    if holder and holder.free > 0 and is_holder(held, holder.cache) and call('ZSCORE', P .. 'offers:' .. key, holder.id)
      and free_now(holder) > most and takes_warm(holder, best, total, passed) then
      found, most = holder, free_now(holder)
    end
  end
  return found
end

-- The worker that a job goes to where nothing waits.
local function favourite(key, digests)
  local best = least_loaded(key)
  return best and digests ~= '' and warmest(key, digests, best) or best
end

-- Sends a job to a worker that offers a slot at ``key``. Answers that worker and the id of the entry; nil if there is none.
-- One that offers nothing more is parked no more: it will claim.
local function hand_over(key, id, envelope, aid, ttl_ms, digests)
  local to = string.len(envelope) <= MAX_HANDED_BYTES and waiting(key) == 0 and favourite(key, digests)
  while to do
    local entry = call('XADD', P .. 'ctl:' .. to.id, 'NOMKSTREAM', '*', 'k', 'job', 'id', id, 'aid', aid, 'left', ttl_ms,
      'env', envelope)
    to.free, to.given, to.keys[key] = entry and to.free - 1 or 0, to.given + (entry and 1 or 0), true
    to.here = to.here + 1
    if to.free == 0 and to.stands then
      call('HSET', P .. 'claimed:' .. to.id, 'full', '1')
    elseif to.free == 0 then
      unpark(to.id, call('HGET', P .. 'claimed:' .. to.id, 'parked'))
    end
    if entry then return to, entry end
    to = favourite(key, digests)
  end
end

-- Writes what was handed over in this call.
local function write_offers()
  for _, one in pairs(takers) do
    if one and next(one.keys) then
      call('HSET', P .. 'claimed:' .. one.id, 'free', int(one.free), 'given', int(one.given))
      for key in pairs(one.keys) do
        -- Their order matters only where not all of them are looked at.
        if #takers_at[key] == MAX_TAKERS then call('ZADD', P .. 'offers:' .. key, 'XX', string.format('%.9f', load_of(one.slots, one.free, one.capacity)), one.id) end
      end
    end
  end
end
