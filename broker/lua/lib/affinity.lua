-- Which engine's cache holds a job's prefix, by who was leased a job with it: ``warm`` is a hash with a fixed number of
-- slots, each of them the proof of a digest and who holds it, ``<session>#<number of its cache>``, the latest first. A
-- cache is one table: it holds what it was leased under its number now and the one before. What is said here of digests is
-- said by scheduling/affinity.py, whose constants ``affinity_rules`` brings; tests compare.
-- uses: counters, finish, affinity_rules
-- rarely: learn, choose

local warm = {}

-- Reads the slots of the first ``limit`` digests of each of these jobs.
local function read_warm(jobs, limit)
  local slots = {}
  for _, digests in ipairs(jobs) do
    for at = 1, math.min(#digests, limit * DIGEST_CHARS), DIGEST_CHARS do
      local slot = string.sub(digests, at, at + SLOT_CHARS - 1)
      if not warm[slot] then slots[#slots + 1], warm[slot] = slot, '' end
    end
  end
  for i, held in ipairs(#slots > 0 and call('HMGET', P .. 'warm', unpack(slots)) or {}) do warm[slots[i]] = held or '' end
end

-- The holders of the digest at this place.
local function holders_at(digests, at)
  local proof, held = string.match(warm[string.sub(digests, at, at + SLOT_CHARS - 1)] or '', '^(%S+) (.*)$')
  return proof == string.sub(digests, at + SLOT_CHARS, at + DIGEST_CHARS - 1) and held or ''
end

-- The holders of the longest known prefix among the first ``limit`` digests, and how many longer ones the job has; nil if
-- there are none.
local function match_prefix(digests, limit)
  for at = 1, math.min(#digests, limit * DIGEST_CHARS), DIGEST_CHARS do
    local held = holders_at(digests, at)
    if held ~= '' then return held, (at - 1) / DIGEST_CHARS end
  end
end

local function cache_of(session_id, number)
  local name = session_id .. '#'
  return { name = name, now = name .. number, before = name .. int(tonumber(number) - 1) }
end

local function has_word(text, word)
  return text and string.find(' ' .. text .. ' ', ' ' .. word .. ' ', 1, true)
end

local function is_holder(held, cache)
  return has_word(held, cache.now) or has_word(held, cache.before)
end

-- ``cache`` holds these digests from now on. Answers whether it held the longest known prefix before.
local function learn(digests, cache)
  read_warm({ digests }, MAX_DIGESTS)
  local was_warm = is_holder(match_prefix(digests, MAX_DIGESTS), cache)
  for at = 1, #digests, DIGEST_CHARS do
    local slot, held, number = string.sub(digests, at, at + SLOT_CHARS - 1), cache.now, 1
    for holder in string.gmatch(holders_at(digests, at), '%S+') do
      if string.sub(holder, 1, #cache.name) ~= cache.name and number < MAX_HOLDERS then held, number = held .. ' ' .. holder, number + 1 end
    end
    held = string.sub(digests, at + SLOT_CHARS, at + DIGEST_CHARS - 1) .. ' ' .. held
    if warm[slot] ~= held then
      warm[slot] = held
      gather('HSET', P .. 'warm', slot, held)
    end
  end
  return was_warm and 'warm' or 'cold'
end

-- A job with these digests runs where ``cache`` is.
local function remember(job, digests, cache)
  total(job, 'affinity/' .. (digests == '' and 'none' or learn(digests, cache)))
end

-- A job left this queue key that had waited for so long: ``<key>:wait``, the longest wait of late, follows.
local function follow_wait(key, waited_ms)
  local longest = counter('counters', key .. ':wait')
  if longest == 0 then return end
  local less = longest - waited_ms
  add('counters', key .. ':wait', math.max(-less, -math.ceil(less / PATIENCE_JOBS), 1 - longest))
end

-- Which of the waiting jobs a worker with ``cache`` takes, given as their digests: the first that is warm here; else the
-- first that is warm nowhere; else the first.
local function choose(waiting, cache)
  local cold = nil
  read_warm(waiting, LOOKAHEAD)
  for i, digests in ipairs(waiting) do
    local held = match_prefix(digests, LOOKAHEAD)
    if is_holder(held, cache) then return i end
    cold = cold or not held and i
  end
  return cold or 1
end
