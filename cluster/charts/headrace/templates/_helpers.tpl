{{- define "headrace.name" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* What selectors select by: KubeRay has its own values for the usual labels of Ray's pods. */ -}}
{{- define "headrace.own" -}}
headrace.io/release: {{ include "headrace.name" (index . 0) }}
headrace.io/component: {{ index . 1 }}
{{- end -}}

{{- define "headrace.labels" -}}
app.kubernetes.io/name: headrace
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "headrace.image" -}}
{{- if .digest -}}{{ printf "%s@%s" .repository .digest }}
{{- else if has .tag (list nil "" "latest") -}}{{ fail (printf "image %s: name it by a digest, or a tag that stays the same" .repository) }}
{{- else -}}{{ printf "%s:%s" .repository .tag }}{{- end -}}
{{- end -}}

{{- /* Fails where a value can be understood, and cannot be meant. */ -}}
{{- define "headrace.checks" -}}
{{- $config := include "headrace.serveConfig" . -}}
{{- if regexMatch "://[^/\\s]*:[^/\\s]*@" $config }}{{ fail "serve: a URL in the configuration holds a password; the chart hands on Secrets only (database.existingSecret)" }}{{ end -}}
{{- $groups := dict "cpu" .Values.cpu -}}
{{- range $name, $pool := .Values.pools }}{{ range $kind := list "spot" "onDemand" }}{{ with get $pool $kind }}{{ $_ := set $groups (printf "pools.%s.%s" $name $kind) . }}{{ end }}{{ end }}{{ end -}}
{{- range $name, $group := $groups }}{{ if gt ($group.minReplicas | int) ($group.maxReplicas | int) }}{{ fail (printf "%s.minReplicas: %v is above maxReplicas, %v" $name $group.minReplicas $group.maxReplicas) }}{{ end }}{{ end -}}
{{- /* Serve waits for ever for a node that holds a replica. */ -}}
{{- range (fromYaml $config).applications }}{{ if eq .import_path "serve_app.app:pool" -}}
{{- $name := .args.name -}}
{{- $pool := get $.Values.pools $name -}}
{{- range $value, $asked := dict "rayCpus" (dig "replicas" "num_cpus" 0 .args) "gpus" (dig "replicas" "num_gpus" 0 .args) -}}
{{- if gt ($asked | float64) (get $pool $value | float64) }}{{ fail (printf "pools.%s.%s: %v, and a replica takes %v: replicas.%s of the configuration" $name $value (get $pool $value) $asked (ternary "num_gpus" "num_cpus" (eq $value "gpus"))) }}{{ end -}}
{{- end -}}
{{- end }}{{ end -}}
{{- end -}}

{{- /* Fails where something would run that is not named by its digest. */ -}}
{{- define "headrace.onlyDigests" -}}
{{- if .Values.image.requireDigest -}}
{{- range $which := list "cpu" "gpu" }}{{ if not (get $.Values.image $which).digest }}{{ fail (printf "image.%s.digest: missing, and image.requireDigest is on" $which) }}{{ end }}{{ end -}}
{{- range $name, $pool := .Values.pools }}{{ with dig "models" "image" nil $pool }}{{ if not .digest }}{{ fail (printf "pools.%s.models.image.digest: missing, and image.requireDigest is on" $name) }}{{ end }}{{ end }}{{ end -}}
{{- $others := dict -}}
{{- if .Values.bundled.enabled }}{{ $_ := merge $others (dict "bundled.postgresImage" .Values.bundled.postgresImage "bundled.redisImage" .Values.bundled.redisImage) }}{{ end -}}
{{- if .Values.tracing.jaeger.enabled }}{{ $_ := set $others "tracing.jaeger.image" .Values.tracing.jaeger.image }}{{ end -}}
{{- range $name, $image := $others }}{{ if not (contains "@sha256:" $image) }}{{ fail (printf "%s: %s has no digest, and image.requireDigest is on" $name $image) }}{{ end }}{{ end -}}
{{- end -}}
{{- end -}}

{{- /* The configuration as YAML: a file of configs/, and what a cluster needs different in it. */ -}}
{{- define "headrace.serveConfig" -}}
{{- $file := printf "files/configs/%s" .Values.serve.config -}}
{{- $text := .Values.serve.configText | default (.Files.Get $file) -}}
{{- if not $text }}{{ fail (printf "serve.config: the chart has no %s; set serve.configText by --set-file" $file) }}{{ end -}}
{{- $config := fromYaml $text -}}
{{- if hasKey $config "Error" }}{{ fail (printf "serve.config: %s" (get $config "Error")) }}{{ end -}}
{{- $_ := mergeOverwrite $config (dict "proxy_location" "EveryNode" "http_options" (dict "host" "0.0.0.0" "port" 8000)) -}}
{{- range $application := $config.applications -}}
{{- $args := $application.args | default dict -}}
{{- $_ := set $application "args" $args -}}
{{- if eq $application.import_path "serve_app.app:control" -}}
{{- $_ := mergeOverwrite $args (dict "database" "postgresql+psycopg://" "resources" (dict "cpu_pool" 0.01)) -}}
{{- with $.Values.opencost.url }}{{ $_ := mergeOverwrite $args (dict "costs" (dict "opencost" (dict "url" .))) }}{{ end -}}
{{- else if eq $application.import_path "serve_app.app:gateway" -}}
{{- $_ := mergeOverwrite $args (dict "replicas" (dict "resources" (dict "cpu_pool" 0.01))) -}}
{{- else if eq $application.import_path "serve_app.app:pool" -}}
{{- if not (hasKey $.Values.pools $args.name) }}{{ fail (printf "pools.%s: missing; the configuration has a pool of this name, so say which nodes it runs on" $args.name) }}{{ end -}}
{{- $_ := mergeOverwrite $args (dict "replicas" (dict "resources" (dict (printf "pool-%s" $args.name) 0.01))) -}}
{{- if eq (dig "engine" "kind" "" $args) "vllm" -}}
{{- $extra := dict -}}
{{- with dig "models" "loadFormat" "" (get $.Values.pools $args.name) }}{{ $_ := set $extra "load_format" . }}{{ end -}}
{{- with include "headrace.tracingEndpoint" $ }}{{ $_ := set $extra "otlp_traces_endpoint" . }}{{ end -}}
{{- if $extra }}{{ $_ := mergeOverwrite $args (dict "engine" (dict "extra" $extra)) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- with get $.Values.serve.overrides $application.name }}{{- $_ := mergeOverwrite $application (deepCopy .) -}}{{- end -}}
{{- end -}}
{{- /* Serve kills a replica that has not ended by then: its own 630 s are for a response of 600 s. */ -}}
{{- $longest := 600 -}}
{{- range $config.applications }}{{ if eq .import_path "serve_app.app:gateway" }}{{ $longest = dig "args" "limits" "max_stream_s" 600 . }}{{ end }}{{ end -}}
{{- if not (or (kindIs "float64" $longest) (kindIs "int64" $longest) (kindIs "int" $longest)) }}{{ fail (printf "serve: limits.max_stream_s of the gateway is %v; a number of seconds is wanted" $longest) }}{{ end -}}
{{- $grace := add (ceil $longest | int) 30 -}}
{{- if gt $grace 630 -}}
{{- range $config.applications }}{{ if has .import_path (list "serve_app.app:gateway" "serve_app.app:pool") }}{{ $_ := set .args "replicas" (merge (dict) (.args.replicas | default dict) (dict "graceful_shutdown_timeout_s" $grace)) }}{{ end }}{{ end -}}
{{- end -}}
{{- $names := list -}}
{{- range $config.applications }}{{ $names = append $names .name }}{{ end -}}
{{- range $name, $_ := $.Values.serve.overrides }}{{ if not (has $name $names) }}{{ fail (printf "serve.overrides.%s: the configuration has no such application" $name) }}{{ end }}{{ end -}}
{{- range $name, $_ := $.Values.pools }}{{ if not (has (printf "pool-%s" $name) $names) }}{{ fail (printf "pools.%s: the configuration has no pool of this name" $name) }}{{ end }}{{ end -}}
{{- toYaml $config -}}
{{- end -}}

{{- /* Where vLLM sends its spans; nothing if nowhere. */ -}}
{{- define "headrace.tracingEndpoint" -}}
{{- if .Values.tracing.jaeger.enabled -}}
http://{{ include "headrace.name" . }}-jaeger:4317
{{- else -}}
{{ .Values.tracing.endpoint }}
{{- end -}}
{{- end -}}

{{- /* How long the longest response may last, seconds; 600 is the configuration's default. */ -}}
{{- define "headrace.longestStream" -}}
{{- $longest := 600 -}}
{{- range (fromYaml (include "headrace.serveConfig" .)).applications -}}
{{- if eq .import_path "serve_app.app:gateway" }}{{ $longest = dig "args" "limits" "max_stream_s" 600 . }}{{ end -}}
{{- end -}}
{{- ceil $longest | int -}}
{{- end -}}

{{- /* The token channel's ranges, as a list of first and last ports. */ -}}
{{- define "headrace.channelPorts" -}}
{{- $ranges := dict -}}
{{- range (fromYaml (include "headrace.serveConfig" .)).applications -}}
{{- $range := list -}}
{{- if eq .import_path "serve_app.app:gateway" }}{{ $range = dig "args" "channel" "ports" (list 21000 21999) . }}{{ end -}}
{{- if eq .import_path "serve_app.app:pool" }}{{ $range = dig "args" "channel_ports" (list 21000 21999) . }}{{ end -}}
{{- if $range }}{{ $_ := set $ranges (printf "%v" $range) (list (index $range 0 | int) (index $range 1 | int)) }}{{ end -}}
{{- end -}}
{{- range $_, $range := $ranges }}
- {{ toJson $range }}
{{- end -}}
{{- end -}}

{{- /* A variable of configs/ray.env. */ -}}
{{- define "headrace.rayEnv" -}}
{{- range (index . 0).Files.Lines "files/ray.env" -}}
{{- if hasPrefix (printf "%s=" (index $ 1)) . }}{{ trimPrefix (printf "%s=" (index $ 1)) . }}{{ end -}}
{{- end -}}
{{- end -}}

{{- /* Environment of every Ray container: configs/ray.env, less what depends on the pod. */ -}}
{{- define "headrace.environment" -}}
{{- $root := index . 0 -}}
{{- $drain := index . 1 -}}
{{- /* HAProxy must not cut the longest response: the file's values are for that of 600 s. */ -}}
{{- $longest := include "headrace.longestStream" $root | int -}}
{{- $least := dict "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S" (add $longest 100) "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S" (add $longest 100) "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S" (add $longest 60) -}}
{{- range $root.Files.Lines "files/ray.env" -}}
{{- $line := trim . -}}
{{- if and $line (not (hasPrefix "#" $line)) -}}
{{- $pair := splitn "=" 2 $line -}}
{{- /* KubeRay sets RAY_AUTH_MODE itself, by authOptions. */ -}}
{{- if not (has $pair._0 (list "RAY_AUTH_MODE" "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")) }}
- {name: {{ $pair._0 }}, value: {{ hasKey $least $pair._0 | ternary (max ($pair._1 | int) (get $least $pair._0 | int) | toString) $pair._1 | quote }}}
{{- end -}}
{{- end -}}
{{- end }}
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ $drain | quote }}}
- {name: RAY_SERVE_HAPROXY_BINARY_PATH, value: /opt/headrace/bin/headrace-haproxy}
- {name: HEADRACE_JOURNAL, value: /var/lib/headrace/journal}
- {name: HEADRACE_HOME, value: /var/cache/headrace/models}
- {name: HF_HOME, value: /var/cache/headrace/huggingface}
- {name: VLLM_CACHE_ROOT, value: /var/cache/headrace/vllm}
- {name: TRITON_CACHE_DIR, value: /var/cache/headrace/triton}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /var/cache/headrace/inductor}
- {name: XDG_CACHE_HOME, value: /var/cache/headrace}
{{- end -}}

{{- define "headrace.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "headrace.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "headrace.fixedPorts" -}}
node-manager-port: "6380"
object-manager-port: "6381"
runtime-env-agent-port: "6382"
dashboard-agent-grpc-port: "6383"
dashboard-agent-listen-port: "52365"
metrics-export-port: "8080"
min-worker-port: "10002"
max-worker-port: "19999"
{{- end -}}

{{- /*
A Ray pod's template. Takes a dict: root, component, pool (or empty), container, image, resources,
shm, models, claim of database, grace, account, selector, tolerations, annotations, priority.
*/ -}}
{{- define "headrace.rayPod" -}}
{{- $root := .root -}}
{{- /* The head asks Redis, CPU pods PostgreSQL: whose certificate they are to trust. */ -}}
{{- $server := get (dict "head" $root.Values.redis "cpu" $root.Values.database) .component | default dict -}}
{{- $certificate := dig "certificate" "existingSecret" "" $server -}}
metadata:
  # Ours only. The usual app.kubernetes.io labels are KubeRay's on these pods, its services select
  # by them; and a label with the chart's version would make a new RayCluster of each release.
  labels:
    {{- include "headrace.own" (list $root .component) | nindent 4 }}
    {{- with .pool }}
    headrace.io/pool: {{ . }}
    {{- end }}
  {{- with .annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "headrace.name" $root }}-{{ .account }}
  automountServiceAccountToken: {{ eq .account "head" }}
  # The autoscaler's second version replaces pods; KubeRay refuses anything else with it.
  restartPolicy: Never
  terminationGracePeriodSeconds: {{ .grace }}
  enableServiceLinks: false
  {{- if $root.Values.priorityClasses.enabled }}
  priorityClassName: {{ include "headrace.name" $root }}-{{ .priority }}
  {{- end }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - {name: {{ . }}}
    {{- end }}
  {{- end }}
  {{- with .nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if eq .component "cpu" }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "headrace.own" (list $root "cpu") | nindent 10 }}
  {{- end }}
  securityContext:
    {{- include "headrace.podSecurity" $root | nindent 4 }}
    # Serve's replicas call each other by gRPC on ports of this range: the network policy names it.
    sysctls: [{name: net.ipv4.ip_local_port_range, value: "32768 60999"}]
  containers:
    - name: {{ .container }}
      image: {{ include "headrace.image" .image }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      # KubeRay adds the readiness and liveness probes; the images hold the bash and wget they call.
      securityContext: {{- include "headrace.containerSecurity" $root | nindent 8 }}
      ports:
        {{- if eq .component "head" }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- end }}
        - {name: serve, containerPort: 8000}
        - {name: metrics, containerPort: 8080}
      env:
        {{- include "headrace.environment" (list $root .drain) | nindent 8 }}
        {{- if $certificate }}
        - {name: {{ ternary "RAY_REDIS_CA_CERT" "PGSSLROOTCERT" (eq .component "head") }}, value: /etc/headrace/certificate/ca.crt}
        {{- end }}
        {{- if eq .component "cpu" }}
        {{- range $name := list "PGHOST" "PGPORT" "PGUSER" "PGDATABASE" "PGPASSWORD" "PGSSLMODE" }}
        - name: {{ $name }}
          valueFrom:
            secretKeyRef: {name: {{ $root.Values.database.existingSecret }}, key: {{ $name }}, optional: {{ has $name (list "PGPORT" "PGSSLMODE") }}}
        {{- end }}
        {{- with $root.Values.bootstrapKey.existingSecret }}
        - name: HEADRACE_BOOTSTRAP_KEY
          valueFrom:
            secretKeyRef: {name: {{ . }}, key: {{ $root.Values.bootstrapKey.key }}}
        {{- end }}
        {{- end }}
      resources: {{- toYaml .resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/headrace}
        - {name: cache, mountPath: /var/cache/headrace}
        - {name: state, mountPath: /var/lib/headrace}
        - {name: shm, mountPath: /dev/shm}
        {{- if $certificate }}
        - {name: certificate, mountPath: /etc/headrace/certificate, readOnly: true}
        {{- end }}
        {{- with .models }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: home, emptyDir: {}}
    - {name: cache, emptyDir: {sizeLimit: {{ $root.Values.cacheSize }}}}
    # Journals: they outlive a container and not the pod. The other witness is on another node.
    - {name: state, emptyDir: {}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .shm }}}}
    {{- if $certificate }}
    - name: certificate
      secret: {secretName: {{ $certificate }}, items: [{key: {{ $server.certificate.key }}, path: ca.crt}]}
    {{- end }}
    {{- with .models }}
    - name: models
      {{- if .claim }}
      persistentVolumeClaim: {claimName: {{ .claim }}, readOnly: true}
      {{- else if .image }}
      {{- if semverCompare "<1.33-0" $root.Capabilities.KubeVersion.Version }}{{ fail "models.image: Kubernetes mounts images from 1.33 on; use a claim" }}{{ end }}
      image: {reference: {{ include "headrace.image" .image | quote }}, pullPolicy: {{ $root.Values.image.pullPolicy }}}
      {{- else }}
      csi: {driver: {{ .csi.driver }}, readOnly: true, volumeAttributes: {{ toJson (.csi.attributes | default dict) }}}
      {{- end }}
    {{- end }}
{{- end -}}

{{- /* One worker group of a pool: dict of root, name, pool, kind (spot or onDemand). */ -}}
{{- define "headrace.poolGroup" -}}
{{- $root := .root -}}
{{- $pool := .pool -}}
{{- $group := get $pool .kind -}}
{{- $spot := eq .kind "spot" -}}
{{- $grace := add (include "headrace.longestStream" $root | int) $root.Values.graceMarginSeconds -}}
{{- if $spot }}{{ $grace = $group.graceSeconds }}{{ end -}}
{{- $resources := deepCopy $pool.resources -}}
{{- $ray := dict "CPU" ($pool.rayCpus | toString) (printf "pool-%s" .name) "1" -}}
{{- if $pool.gpus -}}
{{- $_ := set $ray "GPU" ($pool.gpus | toString) -}}
{{- $_ := mergeOverwrite $resources (dict "limits" (dict "nvidia.com/gpu" ($pool.gpus | toString)) "requests" (dict "nvidia.com/gpu" ($pool.gpus | toString))) -}}
{{- end }}
groupName: {{ .name }}-{{ ternary "spot" "on-demand" $spot }}
# Tried first where it is higher.
priority: {{ ternary 10 0 $spot }}
# No `replicas`: it is the autoscaler's.
minReplicas: {{ $group.minReplicas }}
maxReplicas: {{ $group.maxReplicas }}
# The autoscaler replaces it; a patch of nothing is refused.
scaleStrategy: {}
resources: {{- toYaml $ray | nindent 2 }}
rayStartParams:
  {{- include "headrace.fixedPorts" $root | nindent 2 }}
template:
  {{- include "headrace.rayPod" (dict "root" $root "component" "engine" "pool" .name
    "container" "ray-worker" "image" (get $root.Values.image $pool.image) "resources" $resources
    "shm" ($pool.shmSize | default "2Gi") "models" $pool.models "grace" $grace
    "drain" (sub $grace (ternary 5 30 $spot)) "account" "worker" "priority" "engine"
    "nodeSelector" (mergeOverwrite (dict) (deepCopy ($pool.nodeSelector | default dict)) (deepCopy ($group.nodeSelector | default dict)))
    "tolerations" (concat ($pool.tolerations | default list) ($group.tolerations | default list))
    "annotations" $pool.annotations) | nindent 2 }}
{{- end -}}

{{- /* Selects all Ray pods of this release, as one line. */ -}}
{{- define "headrace.rayPods" -}}
{matchLabels: {headrace.io/release: {{ include "headrace.name" . }}}, matchExpressions: [{key: headrace.io/component, operator: In, values: [head, cpu, engine]}]}
{{- end -}}

{{- /* The ports on which Ray pods talk to each other, as seen: tests/cluster/flows.yaml. */ -}}
{{- define "headrace.rayPorts" -}}
- {port: 6380, endPort: 6383}       # raylet and its agents
- {port: 10002, endPort: 19999}     # Ray's workers
{{- range fromYamlArray (include "headrace.channelPorts" .) }}
- {port: {{ index . 0 }}, endPort: {{ index . 1 }}}     # token channel
{{- end }}
# From every HAProxy to every router.
- {port: {{ include "headrace.rayEnv" (list . "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT") }}, endPort: {{ include "headrace.rayEnv" (list . "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT") }}}
# gRPC between Serve's replicas, on ports the kernel chooses.
- {port: 32768, endPort: 60999}
{{- end -}}

{{- /* What Ray pods ask of the head. */ -}}
{{- define "headrace.headPorts" -}}
- {port: 6379}                      # GCS
- {port: 8500}                      # Serve's own proxy: every HAProxy's way out while it has no router
{{- end -}}

{{- /* Where a DaemonSet for GPU nodes runs: wherever a pool's engines may. */ -}}
{{- define "headrace.gpuNodes" -}}
{{- $tolerations := index . 1 | default list -}}
{{- range $_, $pool := (index . 0).Values.pools }}{{ if $pool.gpus -}}
{{- $tolerations = concat $tolerations ($pool.tolerations | default list) (dig "spot" "tolerations" list $pool) (dig "onDemand" "tolerations" list $pool) -}}
{{- end }}{{ end -}}
affinity:
  nodeAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      nodeSelectorTerms:
        - matchExpressions: [{key: {{ (index . 0).Values.gpuNodeLabel }}, operator: Exists}]
{{- with uniq $tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
