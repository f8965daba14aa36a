{{- /* What is wrong with the values of this release, one problem a line. */}}
{{- define "models.problems" -}}
{{- $root := . -}}
{{ include "common.problems" (dict "root" .) }}
{{- if .Chart.IsRoot }}
{{- if eq .Values.global.tls.mode "generated" }}
global.tls.mode is generated, and only a release with the platform in it generates: name its Secret with mode existingSecret
{{- end }}
{{- if not .Values.global.keys.existingSecret }}
global.keys.existingSecret is missing: this release makes no keys, so name the platform release's Secret, such as argosy-keys
{{- end }}
{{- end }}
{{- if and (eq .Values.global.tls.mode "certManager") (not (.Capabilities.APIVersions.Has "cert-manager.io/v1")) }}
global.tls.mode is certManager, and this cluster has no cert-manager.io/v1
{{- end }}
{{- range $model := include "models.names" . | fromJsonArray }}
{{- $at := printf "models.%s" $model }}
{{- $entry := include "models.entry" (dict "root" $root "model" $model) | fromJson }}
{{- $weights := $entry.weights }}
{{- $service := printf "%s-model-%s" $root.Release.Name $model }}
{{- if gt (len $service) 200 }}
{{ $at }} is too long a name: {{ $service }} has {{ len $service }} characters
{{- end }}
{{- if $entry.twoWays }}
{{ $at }} names both pool and pools: say one
{{- end }}
{{- if eq (first $entry.pools) "" }}
{{ $at }}.pool is missing: it names one of global.nodePools
{{- else }}
{{- $problems := include "common.poolProblems" (dict "root" $root "at" (printf "%s.pool" $at) "pools" $entry.pools "gpus" $entry.gpus) | trim }}
{{- with $problems }}
{{ . }}
{{- end }}
{{- end }}
{{- if and $entry.scaled $entry.countGiven }}
{{ $at }} has both replicas and autoscaling: two would write one field
{{- end }}
{{- if and (eq $entry.engine.kind "argosy") (gt (int $entry.gpus) 1) }}
{{ $at }}.gpus is {{ int $entry.gpus }}, and engine argosy runs a model on one GPU: use engine.kind vllm
{{- end }}
{{- if and (eq $entry.engine.kind "vllm") (not $entry.engine.image) }}
{{ $at }}.engine.image is missing: no image of Argosy's has vLLM, so name one made from argosy-inference
{{- end }}
{{- if eq $entry.engine.kind "vllm" }}
{{- $allowed := include "models.vllmNames" $root | fromYamlArray }}
{{- range $name, $_ := $entry.engine.args }}
{{- if not (has $name $allowed) }}
{{ $at }}.engine.args.{{ $name }} is not one of vLLM's arguments that may be set: {{ join ", " $allowed }}
{{- end }}
{{- end }}
{{- end }}
{{- if gt (int $entry.nodesPerReplica) 1 }}
{{- if ne $entry.engine.kind "vllm" }}
{{ $at }}.nodesPerReplica is {{ int $entry.nodesPerReplica }}, and engine {{ $entry.engine.kind }} runs a model on one node: use engine.kind vllm
{{- end }}
{{- if not ($root.Capabilities.APIVersions.Has "leaderworkerset.x-k8s.io/v1") }}
{{ $at }}.nodesPerReplica is {{ int $entry.nodesPerReplica }}, which needs LeaderWorkerSet, and this cluster has no leaderworkerset.x-k8s.io/v1
{{- end }}
{{- end }}
{{- $one := ternary (eq (int $entry.autoscaling.min) 1) (and (not (kindIs "invalid" $entry.replicas)) (eq (int $entry.replicas) 1)) $entry.scaled }}
{{- if and $one (eq (int $entry.surge) 0) (not $entry.allowDowntime) }}
{{ $at }} has one replica and no room for a second one during a rollout: add a replica, declare spareGpus on its pool, or set allowDowntime
{{- end }}
{{- if and (eq (int $entry.surge) 1) (not $entry.spare) }}
{{ $at }}.rollout.surge is 1, and its pool declares no spareGpus for it: the new pod would wait for the old one's GPU
{{- end }}
{{- range $entry.pools }}
{{- $pool := include "common.pool" (dict "root" $root "pool" .) | fromJson }}
{{- if and $pool.spot (gt (int $entry.grace) (int ($pool.noticeSeconds | default 0))) (not $entry.allowStreamLoss) }}
{{ $at }} drains for up to {{ int $entry.grace }} s, and pool {{ . }} gives {{ int ($pool.noticeSeconds | default 0) }} s notice: shorten drain.maxGenerationSeconds or set allowStreamLoss
{{- end }}
{{- end }}
{{- if eq $weights.source "image" }}
{{- if not $weights.ref }}
{{ $at }}.weights.ref is missing: source image needs an image's name
{{- end }}
{{- if and (not $weights.digest) (ne ($weights.pullPolicy | default $root.Values.global.image.pullPolicy) "Never") }}
{{ $at }}.weights.digest is missing: an image that is pulled is pinned
{{- end }}
{{- if semverCompare "<1.35.0-0" $root.Capabilities.KubeVersion.Version }}
{{ $at }}.weights.source is image, and Kubernetes {{ $root.Capabilities.KubeVersion.Version }} mounts no images unless told to: use 1.35, or source pvc
{{- end }}
{{- else }}
{{- if and (eq $weights.source "hf") (not $weights.ref) }}
{{ $at }}.weights.ref is missing: source hf needs the model's name on the hub
{{- end }}
{{- if and $entry.fetched (not $weights.digest) }}
{{ $at }}.weights.digest is missing: what is fetched is checked against it
{{- end }}
{{- if not (or $weights.digest $weights.path) }}
{{ $at }}.weights needs digest or path: which folder of the claim it is
{{- end }}
{{- if and (not $weights.claim) (not $weights.size) }}
{{ $at }}.weights needs claim, the name of one that exists, or size for a new one
{{- end }}
{{- if and (not $weights.claim) (not $entry.fetched) }}
{{ $at }}.weights has neither a claim nor a ref to fill a new one from
{{- end }}
{{- if and (eq $weights.accessMode "ReadWriteOnce") (gt (add $entry.most $entry.surge | int) 1) (not $entry.cacheClass) }}
{{ $at }}.weights.accessMode is ReadWriteOnce, and {{ add $entry.most $entry.surge }} pods would mount the claim: use ReadWriteMany
{{- end }}
{{- end }}
{{- with $entry.resources.limits.memory }}
{{- $limit := include "common.mebibytes" . | int }}
{{- if le $limit (mul 1024 $entry.shmGiB | int) }}
{{ $at }}.shmGiB is {{ int $entry.shmGiB }}, a part of the memory limit, which is {{ . }}
{{- end }}
{{- end }}
{{- if $entry.scaled }}
{{- $scaling := $entry.autoscaling }}
{{- if gt (int $scaling.min) (int $scaling.max) }}
{{ $at }}.autoscaling.min is {{ int $scaling.min }}, above max {{ int $scaling.max }}
{{- end }}
{{- if eq $scaling.engine "keda" }}
{{- if not (include "models.keda" $root) }}
{{ $at }}.autoscaling.engine is keda, and this cluster has no keda.sh/v1alpha1
{{- end }}
{{- if not (include "models.gatewayAddress" $root) }}
scaling.gatewayAddress is missing: KEDA asks the gateway, such as argosy-gateway.argosy.svc:8444
{{- end }}
{{- else if and (eq (int $scaling.min) 0) (semverCompare "<1.37.0-0" $root.Capabilities.KubeVersion.Version) }}
{{ $at }}.autoscaling.min is 0, which an HPA has from Kubernetes 1.37 and this is {{ $root.Capabilities.KubeVersion.Version }}: use engine keda
{{- end }}
{{- end }}
{{- end }}
{{ include "models.capacityProblems" . }}
{{- end }}

{{- /* Does all of it fit its pools at once, rollouts included? Models with fallbacks fill what the others leave, in the order they name. */}}
{{- define "models.capacityProblems" -}}
{{- $root := . -}}
{{- $free := dict -}}{{- $needs := dict -}}{{- $fallbacks := list -}}
{{- range $name := include "common.poolNames" (dict "root" $root) | fromJsonArray -}}
{{- $pool := include "common.pool" (dict "root" $root "pool" $name) | fromJson -}}
{{- if and (ne $pool.gpu.mode "none") $pool.nodes $pool.gpu.perNode -}}
{{- $_ := set $free $name (sub (mul $pool.nodes $pool.gpu.perNode) $pool.reservedGpus | int) -}}
{{- $_ := set $needs $name (ternary (list (printf "%d reserved" (int $pool.reservedGpus))) list (gt (int $pool.reservedGpus) 0)) -}}
{{- end -}}
{{- end -}}
{{- $placed := list -}}
{{- range $model := include "models.names" . | fromJsonArray -}}
{{- $entry := include "models.entry" (dict "root" $root "model" $model) | fromJson -}}
{{- $each := mul $entry.gpus $entry.nodesPerReplica | int -}}
{{- $count := add $entry.most $entry.surge | int -}}
{{- $known := list -}}
{{- range $entry.pools }}{{ if hasKey $free . }}{{ $known = append $known . }}{{ end }}{{ end -}}
{{- if and $known $count $each -}}
{{- $count_text := ternary (printf "(%d+1)" (int $entry.most)) (printf "%d" (int $entry.most)) (eq (int $entry.surge) 1) -}}
{{- $need := dict "model" $model "pools" $known "each" $each "count" $count "text" (printf "%s needs %s × %d = %d" $model $count_text $each (mul $count $each | int)) -}}
{{- if eq (len $known) 1 }}{{ $placed = prepend $placed $need }}{{ else }}{{ $fallbacks = append $fallbacks $need }}{{ end -}}
{{- end -}}
{{- end }}
{{- range $need := $placed -}}
{{- $pool := first $need.pools -}}
{{- $_ := set $free $pool (sub (get $free $pool) (mul $need.count $need.each) | int) -}}
{{- $_ := set $needs $pool (append (get $needs $pool) $need.text) -}}
{{- end }}
{{- range $name, $left := $free }}
{{- if lt $left 0 }}
{{- $pool := include "common.pool" (dict "root" $root "pool" $name) | fromJson }}
pool {{ $name }} has {{ int $pool.nodes }} × {{ int $pool.gpu.perNode }} = {{ mul $pool.nodes $pool.gpu.perNode }} GPUs, {{ join ", " (get $needs $name) }}
{{- end }}
{{- end }}
{{- range $need := $fallbacks }}
{{- $left := $need.count -}}{{- $room := list -}}
{{- range $need.pools }}
{{- $room = append $room (printf "%s %d" . (max 0 (get $free .) | int)) }}
{{- $here := min $left (div (max 0 (get $free .)) $need.each) | int }}
{{- $left = sub $left $here | int }}
{{- $_ := set $free . (sub (get $free .) (mul $here $need.each) | int) }}
{{- end }}
{{- if gt $left 0 }}
pools {{ join " and " $need.pools }} have too few GPUs left ({{ join ", " $room }}): {{ $need.text }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The replica refuses any other when it starts. */}}
{{- define "models.vllmNames" -}}
[block_size, cpu_offload_gb, distributed_executor_backend, enforce_eager, gpu_memory_utilization, kv_cache_dtype, master_addr, master_port,
max_model_len, max_num_batched_tokens, nnodes, node_rank, pipeline_parallel_size, quantization, tensor_parallel_size]
{{- end }}
