-- An incarnation of a worker enters: it may claim from now on.
-- ARGV: prefix, incarnation. Reply: its renewal number; a negative one if it is being declared dead: a late copy of this
--       call does not let it in again.

local incarnation = ARGV[2]
local number = tonumber(call('HGET', P .. 'beats', incarnation) or 0)
if number < 0 then return number end
local control = P .. 'ctl:' .. incarnation
if call('EXISTS', control) == 0 then call('XADD', control, '*', 'k', 'hello') end
call('PEXPIRE', control, int(CONTROL_TTL_MS + EXPIRY_SLACK_MS))
return call('HINCRBY', P .. 'beats', incarnation, 1)
