-- An session id of a worker enters: it may claim from now on.
-- ARGV: prefix, session_id. Reply: its renewal number; a negative one if it is being declared dead: a late copy of this
--       call does not let it in again.

local session_id = ARGV[2]
local number = tonumber(call('HGET', P .. 'beats', session_id) or 0)
if number < 0 then return number end
local control = P .. 'ctl:' .. session_id
if call('EXISTS', control) == 0 then call('XADD', control, '*', 'k', 'hello') end
call('PEXPIRE', control, int(CONTROL_TTL_MS + EXPIRY_SLACK_MS))
return call('HINCRBY', P .. 'beats', session_id, 1)
