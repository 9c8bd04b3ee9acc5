# The module's outputs as this configuration's own: pipelines.launch --terraform reads them here.

output "project" {
  description = "Project that the jobs run in."
  value       = module.sdjax.project
}

output "region" {
  description = "Region of the jobs."
  value       = module.sdjax.region
}

output "subnetwork" {
  description = "Subnetwork of the workers."
  value       = module.sdjax.subnetwork
}

output "service_account_email" {
  description = "Account that the workers run as."
  value       = module.sdjax.service_account_email
}

output "launcher_service_account" {
  description = "Account that starts and watches the jobs: gcloud auth application-default login --impersonate-service-account takes it."
  value       = module.sdjax.launcher_service_account
}

output "staging_location" {
  description = "Where a job's own files go."
  value       = module.sdjax.staging_location
}

output "temp_location" {
  description = "Where a job's temporary files go."
  value       = module.sdjax.temp_location
}

output "compilation_cache" {
  description = "Where the workers keep compiled programs for each other and for the next job."
  value       = module.sdjax.compilation_cache
}

output "dataset" {
  description = "Bucket of prompts, models and images."
  value       = module.sdjax.dataset
}

output "dataflow_kms_key" {
  description = "Key that jobs are encrypted with; null for Google's own."
  value       = module.sdjax.dataflow_kms_key
}

output "sdk_container_image" {
  description = "Image of launcher and workers, by Dockerfile target: build and push these."
  value       = module.sdjax.sdk_container_image
}

output "template_file_gcs_location" {
  description = "Flex Template spec, by Dockerfile target."
  value       = module.sdjax.template_file_gcs_location
}
