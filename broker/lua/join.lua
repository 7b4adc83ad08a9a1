-- Lets a worker session in: it may claim from now on.
-- ARGV: prefix, session id.
-- Reply: its renewal number; a negative one if it is being declared dead: a late copy of this call does not let it in again.
-- Invariant: 3 fence.
-- uses: streams

local session_id = ARGV[2]
local number = tonumber(call('HGET', P .. 'renewals', session_id) or 0)
if number < 0 then return number end
keep_stream(P .. 'ctl:' .. session_id, '0', CONTROL_TTL_MS)
return call('HINCRBY', P .. 'renewals', session_id, 1)
