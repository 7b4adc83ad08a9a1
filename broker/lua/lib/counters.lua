-- Two hashes: ``budget`` (live jobs and bytes of tenants and pools, by which new work is refused) and ``counters`` (what
-- waits, also by its cost, and runs, turns, rates and totals, by queue key). Changes gather while a script runs. Every script that
-- changes anything returns with ``write_counters_and_return``, which writes them; a field that becomes 0 is removed, but
-- for what runs at a queue key, which has totals as well.
-- uses: shard

local COSTS = { ':r:cost', ':0:cost', ':1:cost', ':2:cost', ':3:cost' } -- of what waits at a queue key: retried, by band
local CHUNK = 1000 -- Lua passes 8000 arguments at most. Even: HSET takes pairs
local changes = { budget = {}, counters = {} }
local known = { budget = {}, counters = {} }
local gathered = {}

local function add(hash, field, by)
  changes[hash][field] = (changes[hash][field] or 0) + by
end

local function names_of(set)
  local names = {}
  for name in pairs(set) do names[#names + 1] = name end
  return names
end

-- Reads those fields that this call does not know yet.
local function read(hash, fields)
  local unknown = {}
  for _, field in ipairs(fields) do
    if not known[hash][field] then unknown[#unknown + 1] = field end
  end
  for from = 1, #unknown, CHUNK do
    local values = call('HMGET', P .. hash, unpack(unknown, from, math.min(from + CHUNK - 1, #unknown)))
    for i, value in ipairs(values) do known[hash][unknown[from + i - 1]] = tonumber(value or 0) end
  end
end

local function counter(hash, field)
  if not known[hash][field] then read(hash, { field }) end
  return known[hash][field] + (changes[hash][field] or 0)
end

-- Which of the ``COSTS`` the jobs of a waiting stream count among.
local function cost_kind(queue)
  return (string.match(queue, '^q:.*(:%d):[^:]*$') or ':r') .. ':cost'
end

-- What waits at a queue key, in one of its streams, has become one job more (or less, with -1).
local function count_waiting(key, queue, by, cost)
  add('counters', key .. ':waiting', by)
  add('counters', key .. cost_kind(queue), by * tonumber(cost))
end

local function waiting(key)
  return counter('counters', key .. ':waiting')
end

-- What a job counts for in the budgets of its tenant and its pool.
local function spend(pool, tenant, jobs, bytes)
  add('budget', 't:' .. tenant .. ':jobs', jobs)
  add('budget', 't:' .. tenant .. ':bytes', bytes)
  add('budget', 'p:' .. pool .. ':jobs', jobs)
  add('budget', 'p:' .. pool .. ':bytes', bytes)
end

-- Has members written or removed (HSET, HDEL, ZADD, ZREM) together with the others of this call.
local function gather(command, key, first, second)
  local name = command .. ' ' .. key
  local members = gathered[name] or { command = command, key = key }
  gathered[name], members[#members + 1] = members, first
  if second then members[#members + 1] = second end
end

local function write_in_chunks(command, key, args)
  for from = 1, #args, CHUNK do call(command, key, unpack(args, from, math.min(from + CHUNK - 1, #args))) end
end

local function write_counters_and_return(reply)
  for hash, fields in pairs(changes) do
    local changed, set, gone = {}, {}, {}
    for field, by in pairs(fields) do
      if by ~= 0 then changed[#changed + 1] = field end
    end
    read(hash, changed)
    for _, field in ipairs(changed) do
      local value = known[hash][field] + fields[field]
      if value ~= 0 or string.sub(field, -7) == ':leased' then
        set[#set + 1], set[#set + 2] = field, int(value)
      else
        gone[#gone + 1] = field
        local drained = string.match(field, '^(.*):waiting$')
        for _, kind in ipairs(drained and { ':turn', ':wait', unpack(COSTS) } or {}) do gone[#gone + 1] = drained .. kind end
      end
    end
    write_in_chunks('HSET', P .. hash, set)
    write_in_chunks('HDEL', P .. hash, gone)
  end
  for _, members in pairs(gathered) do write_in_chunks(members.command, members.key, members) end
  return reply
end
