{{- /* Also what the umbrella says. Takes the platform chart's context. */}}
{{- define "platform.notes" -}}
{{- $gateway := include "common.name" (dict "root" . "component" "gateway") }}
{{- $namespace := .Release.Namespace }}
Argosy {{ .Chart.AppVersion }} answers at {{ $gateway }}.{{ $namespace }}.svc:{{ int .Values.gateway.service.port }} (gRPC over TLS).

The platform's API key, shown once; it may create projects and keys:

  export ARGOSY_API_KEY=$(kubectl exec -n {{ $namespace }} deploy/{{ $gateway }} -- python -m services.gateway bootstrap)

The gateway on this machine, and whom to trust:

  kubectl get secret -n {{ $namespace }} {{ .Values.gateway.certificateSecret | default (include "common.tlsSecret" (dict "root" . "component" "gateway")) }} -o 'jsonpath={.data.ca\.crt}' | base64 -d > argosy-ca.crt && (kubectl port-forward -n {{ $namespace }} svc/{{ $gateway }} 8443:{{ int .Values.gateway.service.port }} > /dev/null &)

The first call, with the client of clients/python:

  ARGOSY_ADDRESS=localhost:8443 ARGOSY_CA=argosy-ca.crt argosy models list

`helm test -n {{ $namespace }} {{ .Release.Name }}` makes a real call from inside.
{{- $missing := list }}
{{- $apis := .Capabilities.APIVersions }}
{{- if and (or .Values.monitoring.monitors .Values.monitoring.rules) (not ($apis.Has "monitoring.coreos.com/v1")) }}
{{- $missing = append $missing "PodMonitors and PrometheusRule (monitoring.coreos.com/v1): Prometheus' operator is not here" }}
{{- end }}
{{- if and .Values.finetune.queueName (not (or ($apis.Has "kueue.x-k8s.io/v1beta2") ($apis.Has "kueue.x-k8s.io/v1beta1"))) }}
{{- $missing = append $missing "queueing by Kueue: it is not here, so Jobs wait in our own queue" }}
{{- end }}
{{- if and (eq .Values.gateway.route.kind "none") (eq .Values.gateway.service.type "ClusterIP") }}
{{- $missing = append $missing "a way in from outside the cluster: gateway.route.kind or gateway.service.type" }}
{{- end }}
{{- if eq .Values.global.tls.mode "generated" }}
{{- $missing = append $missing "certificates of yours: this release made its own CA (global.tls.mode)" }}
{{- end }}
{{- if $missing }}

Not installed:
{{- range $missing }}
  - {{ . }}
{{- end }}
{{- end }}
{{- end }}
