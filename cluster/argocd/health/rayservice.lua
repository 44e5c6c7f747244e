-- A RayService is healthy when it serves, nothing moves and every application runs. KubeRay's
-- conditions: Ready, UpgradeInProgress; reasons that end nothing by themselves are Degraded.
local health = { status = "Progressing", message = "KubeRay has not said anything yet" }
if obj.spec ~= nil and obj.spec.suspend == true then
  return { status = "Suspended", message = "spec.suspend is true" }
end
local status = obj.status
if status == nil or status.conditions == nil then return health end
local observed = status.observedGeneration
if observed ~= nil and obj.metadata.generation ~= nil and observed < obj.metadata.generation then
  return { status = "Progressing", message = "KubeRay has not seen the last change" }
end

local ready, moving = nil, nil
for _, condition in ipairs(status.conditions) do
  if condition.type == "Ready" then ready = condition end
  if condition.type == "UpgradeInProgress" then moving = condition end
end
local function said(condition)
  return (condition.reason or "") .. ": " .. (condition.message or "")
end

if ready ~= nil and ready.status == "False" then
  local final = { InitializingTimeout = true, ValidationFailed = true }
  if final[ready.reason] then return { status = "Degraded", message = said(ready) } end
end
-- Above what moves: an application that cannot start makes an upgrade wait for ever.
local active = status.activeServiceStatus
if active ~= nil and active.applicationStatuses ~= nil then
  for name, application in pairs(active.applicationStatuses) do
    if application.status == "DEPLOY_FAILED" or application.status == "UNHEALTHY" then
      return { status = "Degraded", message = name .. ": " .. application.status .. " " .. (application.message or "") }
    end
  end
end
if moving ~= nil and moving.status == "True" then
  return { status = "Progressing", message = said(moving) }
end
if ready == nil then return health end
if ready.status == "True" then
  return { status = "Healthy", message = ready.message or "" }
end
return { status = "Progressing", message = said(ready) }
