-- Takes or keeps the acting Manager's lease (or that of the one sweeper), on a clock of its own that steps of the server's do
-- not move: what was left of the lease is left.
-- KEYS[1]: the lease (hash: holder, term, until, clock, url, proof). ARGV: manager id, ttl_ms (0 gives it up), where the holder
--       is reached ('': not said), and its proof of that: kept with the lease, so that they are its holder's.
-- Reply: the term while acting, else 0. The term rises each time the holder changes, and comes from here alone. One that is
--       no count below MAX_TERM is begun again: workers are made to follow.
-- uses: clock

local MAX_TERM = 2 ^ 40
local lease, manager_id, ttl_ms = KEYS[1], ARGV[1], tonumber(ARGV[2])
local held = call('HMGET', lease, 'holder', 'term', 'until', 'clock')
local now, clock_written = clock_after(held[4])
if clock_written then call('HSET', lease, 'clock', clock_written) end
local term, until_ms = tonumber(held[2]) or 0, tonumber(held[3]) or 0
if not (term >= 0 and term < MAX_TERM and term == math.floor(term)) then term = 0 end
local is_live = held[1] and until_ms > now
if is_live and held[1] ~= manager_id then return 0 end
if ttl_ms == 0 and is_live then call('HSET', lease, 'until', '0') end
if ttl_ms == 0 then return 0 end
if not is_live or term == 0 then term = term + 1 end
call('HSET', lease, 'holder', manager_id, 'term', int(term), 'until', int(now + ttl_ms), 'url', ARGV[3] or '', 'proof',
  ARGV[4] or '')
return term
