# A Flex Template a Dockerfile target: a JSON spec in the staging bucket that names the image and says what may be passed.

locals {
  repository = "${var.region}-docker.pkg.dev/${var.project}/${google_artifact_registry_repository.images.repository_id}"
  images     = { for target in var.targets : target => "${local.repository}/${var.name}-${target}:${var.image_tag}" }
  staging    = "gs://${google_storage_bucket.staging.name}"

  compilation_cache = "${local.staging}/compilation-cache"

  # What holds for every job, in the API's words. Jobs add machine, accelerator, zone and number of workers.
  environments = {
    for target, image in local.images : target => merge(
      {
        additionalExperiments = ["no_use_multiple_sdk_containers"]
        ipConfiguration       = "WORKER_IP_PRIVATE"
        sdkContainerImage     = image
        serviceAccountEmail   = google_service_account.worker.email
        stagingLocation       = "${local.staging}/staging"
        subnetwork            = local.subnetwork
        tempLocation          = "${local.staging}/temp"
      },
      var.cmek == null ? {} : { kmsKeyName = local.kms_key },
    )
  }
  subnetwork = "regions/${var.region}/subnetworks/${google_compute_subnetwork.this.name}"
}

resource "google_storage_bucket_object" "template" {
  for_each = local.images

  bucket       = google_storage_bucket.staging.name
  name         = "templates/${var.image_tag}/${each.key}.json"
  content_type = "application/json"
  content = jsonencode({
    image              = each.value
    sdkInfo            = { language = "PYTHON" }
    metadata           = jsondecode(file("${path.module}/flex-template-metadata.json"))
    defaultEnvironment = local.environments[each.key]
  })

  # Destroyed before the binding by which owners may delete it.
  depends_on = [google_storage_bucket_iam_binding.staging]
}
