{{- /* Names, labels and selectors. Each takes `it`: a map with root (a chart's context), component, and for a model's things model. */}}

{{- /* <release>-<component>[-<model>], a name for any object: at most 52 characters of [a-z0-9-]. What had to be changed ends in a hash. */}}
{{- define "common.name" -}}
{{- $full := printf "%s-%s" .root.Release.Name .component -}}
{{- with .model }}{{ $full = printf "%s-%s" $full . }}{{ end -}}
{{- $name := regexReplaceAll "[^a-z0-9-]" (lower $full) "-" -}}
{{- if or (ne $name $full) (gt (len $name) 52) -}}
{{- printf "%s-%s" (trunc 43 $name | trimSuffix "-") (sha256sum $full | trunc 8) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
{{- end }}

{{- /* What selects pods. They can never be changed, so no version and no label of a user's is among them. */}}
{{- define "common.selectorLabels" -}}
app.kubernetes.io/name: argosy
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .model }}
argosy.dev/model: {{ . | quote }}
{{- end }}
{{- end }}

{{- /* The same inside a flow mapping. */}}
{{- define "common.selector" -}}
{{ include "common.selectorLabels" . | fromYaml | toJson }}
{{- end }}

{{- define "common.labels" -}}
{{ include "common.selectorLabels" . }}
app.kubernetes.io/part-of: argosy
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{- /* Takes root; name (gateway, inference, …); image: a full reference that wins. A digest pins what a tag only names. */}}
{{- define "common.image" -}}
{{- $global := .root.Values.global.image -}}
{{- if .image -}}
{{- .image -}}
{{- else -}}
{{- $tag := $global.tag | default .root.Chart.AppVersion -}}
{{- $digest := get ($global.digests | default dict) .name -}}
{{- printf "%s/argosy-%s:%s%s" $global.registry .name $tag (ternary (printf "@%s" $digest) "" (not (empty $digest))) | trimPrefix "/" -}}
{{- end -}}
{{- end }}

{{- /* The Secret with the component's tls.crt, tls.key and ca.crt. */}}
{{- define "common.tlsSecret" -}}
{{- $tls := .root.Values.global.tls -}}
{{- if eq $tls.mode "existingSecret" -}}
{{- $tls.existingSecret -}}
{{- else if eq $tls.mode "generated" -}}
{{- printf "%s-tls" .root.Release.Name -}}
{{- else -}}
{{- printf "%s-tls" (include "common.name" .) -}}
{{- end -}}
{{- end }}

{{- /* The Secret with the keys that services sign with. Takes root. */}}
{{- define "common.keysSecret" -}}
{{ .root.Values.global.keys.existingSecret | default (printf "%s-keys" .root.Release.Name) }}
{{- end }}
