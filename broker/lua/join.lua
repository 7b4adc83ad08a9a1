-- An incarnation of a worker enters: it may claim from now on.
-- ARGV: prefix, incarnation. Reply: its renewal number.

local incarnation = ARGV[2]
local control = P .. 'ctl:' .. incarnation
if call('EXISTS', control) == 0 then call('XADD', control, '*', 'k', 'hello') end
call('PEXPIRE', control, CONTROL_TTL_MS)
return call('HINCRBY', P .. 'beats', incarnation, 1)
