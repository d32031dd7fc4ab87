-- A row of `rows`: what scripts do all day. Runs in Lua 5.4 and in LuaJIT.
local function primes(below)
    local composite, count = {}, 0
    for n = 2, below do
        if not composite[n] then
            count = count + 1
            for m = n * n, below, n do composite[m] = true end
        end
    end
    return count
end

local function words(count)
    local parts = {}
    for n = 1, count do parts[#parts + 1] = ("%d-%s"):format(n, ("x"):rep(n % 5)) end
    local total = 0
    for word in table.concat(parts, " "):gmatch("%d+%-x*") do
        if word:sub(-1) ~= "" then total = total + 1 end
    end
    return total
end

local function fib(n)
    if n < 2 then return n end
    return fib(n - 1) + fib(n - 2)
end

local times = ... or 4
local found, matched, last
for _ = 1, times do
    found, matched, last = primes(2000), words(25000), fib(24)
end
return found .. " " .. matched .. " " .. last
