-- The acting Manager's lease, on the server's clock: taken if free or run out, kept by its holder. When that clock steps,
-- in either direction, the end of the lease moves along: what was left of it is left.
-- KEYS[1]: the lease (hash: holder, term, until, at: when somebody looked last, ttl). ARGV: manager id, ttl_ms (0 gives it
-- up), where the holder is reached ('': not said), and its proof of that. Kept with the lease, so that they are its
-- holder's.
-- Reply: the term while acting, else 0. The term rises each time the holder changes, and comes from here alone. One that
-- is no count below MAX_TERM (an older version took over what it was told) is begun again: workers are made to follow.

local MAX_TERM = 2 ^ 40
local GAP_MS = 10000 -- whoever wants the lease looks more often: beyond it the clock stepped, or nobody was there
local LOOKED_MS = 1000
local lease = KEYS[1]
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local held = redis.call('HMGET', lease, 'holder', 'term', 'until', 'at', 'ttl')
local term, ttl = tonumber(held[2] or 0), tonumber(ARGV[2])
if not (term and term >= 0 and term < MAX_TERM and term == math.floor(term)) then term = 0 end
local until_ms = tonumber(held[3] or 0) or 0
local at, held_ttl = tonumber(held[4] or now) or now, tonumber(held[5] or ttl) or ttl

local function write(...)
  redis.call('HSET', lease, 'at', string.format('%.0f', now), ...)
end

local passed = now - at
if until_ms > 0 and (passed < 0 or passed > GAP_MS) then
  local counts = passed > 0 and held_ttl / 2 or 0
  until_ms = now + math.max(math.min(until_ms - at, held_ttl) - counts, 0)
  write('until', string.format('%.0f', until_ms))
elseif held[1] and passed >= LOOKED_MS then
  write()
end
local live = held[1] and until_ms > now
if live and held[1] ~= ARGV[1] then return 0 end
if ttl == 0 then
  if live then redis.call('HSET', lease, 'until', '0') end
  return 0
end
if not live or term == 0 then term = term + 1 end
write('holder', ARGV[1], 'term', string.format('%.0f', term), 'until', string.format('%.0f', now + ttl), 'ttl', ARGV[2],
  'url', ARGV[3] or '', 'proof', ARGV[4] or '')
return term
